"""CPU threads: how many a run computes with, and what they do while they wait."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: Hidden units of the model for each thread. Measured on two cores (LoRA step, 16 × 48 tokens): a second thread makes a
#: model 128 wide 1.0 to 1.2 times as fast, one 192 wide 1.5 times, and wider ones 1.5 to 1.7 times.
WIDTH = 64
#: Iterations that a thread of GNU OpenMP spins before it sleeps, about 10 µs (its own default: some milliseconds).
#: Without competition this costs nothing; beside four busy processes a step on two threads is 2 to 7 times as fast.
SPINS = 1000


@dataclass(frozen=True)
class Threads:
    """How many threads compute, and why so many."""

    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.count} CPU thread{'s' * (self.count > 1)}: {self.reason}"


def let_waiting_threads_sleep() -> None:
    """Keep OpenMP's threads from spinning while others use the cores; the user's own settings stand.

    Works in a process that has not imported torch yet, and in its children.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
        os.environ["KMP_BLOCKTIME"] = "0"  # ms, for LLVM's and Intel's OpenMP


def available_cores() -> Threads:
    """As many threads as this process may use cores, and what limits them."""
    limits = [Threads(os.cpu_count() or 1, "all cores")]
    if hasattr(os, "sched_getaffinity"):
        limits.append(Threads(len(os.sched_getaffinity(0)), "the cores given to this process"))
    quota = cgroup_cores()
    if quota is not None:
        limits.append(Threads(max(1, math.floor(quota)), f"cgroup limit of {quota:g} cores"))
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if wanted.isdigit() and int(wanted) > 0:
        limits.append(Threads(int(wanted), "OMP_NUM_THREADS"))
    return min(limits, key=lambda threads: threads.count)


def cgroup_cores(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processor time that the control groups of this process allow, in cores; None if they do not limit it."""
    quotas = []
    with suppress(OSError, ValueError):
        for line in process.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            inner = root / path.lstrip("/") if not controllers else root / "cpu" / path.lstrip("/")
            for folder in (inner, *inner.parents):
                if folder == root.parent:
                    break
                quotas += _quota(folder)
    return min(quotas, default=None)


def _quota(folder: Path) -> list[float]:
    """The limit in one control group: cpu.max of version 2, cpu.cfs_quota_us of version 1."""
    with suppress(OSError, ValueError):
        limit, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return [] if limit == "max" else [int(limit) / int(period)]
    with suppress(OSError, ValueError):
        limit, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
        return [] if int(limit) < 0 else [int(limit) / int(period)]
    return []


def choose(setting: int | None, width: int) -> Threads:
    """The threads for a model of ``width`` hidden units; ``setting`` is ``hardware.threads``."""
    if setting is not None:
        return Threads(setting, "hardware.threads")
    cores, useful = available_cores(), max(1, width // WIDTH)
    if useful < cores.count:
        return Threads(useful, f"a model this narrow gains nothing from all {cores.count} cores (hardware.threads=N)")
    return cores
