"""The process that works on a run: whether it still lives, and how much memory it took."""

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

BEAT = 30  # s between the signs of life of a process that works on a run
LAPSE = 4  # beats without one after which it counts as gone: clocks differ, and shared file systems cache


def this_process() -> dict[str, Any]:
    """What tells this process from every other one, on other machines and later ones of its number too."""
    return {"host": platform.node(), "pid": os.getpid(), "began": began(os.getpid()), "beat": BEAT}


@contextmanager
def showing_life(file: Path) -> Iterator[None]:
    """Touch ``file`` every :data:`BEAT` seconds inside, so that other machines see that this process works."""
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
    """Whether what :func:`this_process` once returned still runs, as ``file``, which names it, shows.

    On this machine the kernel knows. Of another one only the signs of life in ``file`` are known; without any (runs of
    earlier versions have none) nobody can tell, and the answer is no.
    """
    if process is None:
        return False
    if process["host"] == platform.node():
        return began(process["pid"]) == process["began"] is not None
    return "beat" in process and _age(file) < LAPSE * process["beat"]


def is_gone(process: Mapping[str, Any] | None, file: Path) -> bool:
    """Whether it is certain that what :func:`this_process` once returned runs no longer."""
    known = process is not None and (process["host"] == platform.node() or "beat" in process)
    return known and not is_alive(process, file)


def _age(file: Path) -> float:
    """Seconds since a file was written or touched; endless without one."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return float("inf")


def began(pid: int) -> int | None:
    """When a process started, in the kernel's ticks since boot (without /proc: 0); None where there is no process."""
    if Path("/proc/self/stat").exists():
        with suppress(OSError):
            state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            return None if state in "ZX" else int(fields[18])  # proc_pid_stat(5): fields 3 and 22
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it is another user's
        pass
    return 0


def reset_peak_memory() -> None:
    """Let :func:`peak_memory_bytes` count from now on, from what is in use, where the system can (Linux)."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what was freed goes back to the system
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc_pid_clear_refs(5): the peak


def peak_memory_bytes() -> int:
    """Largest resident size of this process since :func:`reset_peak_memory`; without Linux' /proc, since it started."""
    found = _status("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def resident_bytes() -> int:
    """Resident size of this process now; without Linux' /proc its largest so far."""
    found = _status("VmRSS")
    return peak_memory_bytes() if found is None else found


def _status(name: str) -> int | None:
    """A size that the kernel tells of this process, in bytes; None where it tells none (proc_pid_status(5))."""
    with suppress(OSError):
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None
