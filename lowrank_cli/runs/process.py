"""The process that works on a run: whether it is alive, and how much memory it uses."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

BEAT = 30  # s between heartbeats of a process that works on a run
LAPSE = 4  # missed heartbeats after which it counts as gone: clocks differ, and shared file systems cache


def this_process() -> dict[str, Any]:
    """Identifies this process, also among other machines and later processes with the same pid."""
    return {"host": platform.node(), "pid": os.getpid(), "began": began(os.getpid()), "beat": BEAT}


@contextmanager
def showing_life(file: Path) -> Iterator[None]:
    """Inside, touch ``file`` every :data:`BEAT` seconds: a heartbeat that other machines can see."""
    ended = Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):
                os.utime(file)

    Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def is_alive(process: Mapping[str, Any] | None, file: Path) -> bool:
    """Whether a process still runs.

    On this machine the kernel says so; on another one, the heartbeat. Without a heartbeat (as in runs of earlier
    versions) the answer is False.

    Args:
        process: what :func:`this_process` returned in that process.
        file: the file that records it and carries its heartbeat.
    """
    if process is None:
        return False
    if process["host"] == platform.node():
        return began(process["pid"]) == process["began"] is not None
    return "beat" in process and _age(file) < LAPSE * process["beat"]


def is_gone(process: Mapping[str, Any] | None, file: Path) -> bool:
    """Whether it is certain that a process no longer runs; arguments as of :func:`is_alive`."""
    known = process is not None and (process["host"] == platform.node() or "beat" in process)
    return known and not is_alive(process, file)


def _age(file: Path) -> float:
    """Seconds since a file was written or touched; infinite if there is none."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return float("inf")


def began(pid: int) -> int | None:
    """When a process started, in kernel ticks since boot (0 without /proc); None if there is no such process."""
    if Path("/proc/self/stat").exists():
        with suppress(OSError):
            state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            return None if state in "ZX" else int(fields[18])  # proc_pid_stat(5): fields 3 and 22
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's process
        pass
    return 0


def reset_peak_memory() -> None:
    """Restart :func:`peak_memory_bytes` from the memory in use now, where the system can (Linux)."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: return freed memory to the system
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc_pid_clear_refs(5): the peak


def peak_memory_bytes() -> int:
    """Largest resident size of this process since :func:`reset_peak_memory`; without /proc, since it started."""
    size = _status("VmHWM")
    if size is not None:
        return size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def resident_bytes() -> int:
    """Resident size of this process now; without /proc, its largest so far."""
    size = _status("VmRSS")
    return peak_memory_bytes() if size is None else size


def _status(name: str) -> int | None:
    """A size in /proc/self/status, in bytes; None if it is not there (proc_pid_status(5))."""
    with suppress(OSError):
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
        return int(match[1]) * 1024 if match else None
    return None
