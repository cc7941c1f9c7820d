"""CPU threads: how many a run uses, and what they do while waiting."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: Hidden units per thread. Measured on two cores (LoRA step, 16 × 48 tokens): a second thread makes a model of width
#: 128 faster by a factor of 1.0 to 1.2, of width 192 by 1.5, and wider ones by 1.5 to 1.7.
WIDTH = 64
#: Iterations that a thread of GNU OpenMP spins before it sleeps, about 10 µs (default: some milliseconds). Free on an
#: idle machine; next to four busy processes, a step on two threads is 2 to 7 times as fast.
SPINS = 1000


@dataclass(frozen=True)
class Threads:
    """A number of threads, and the reason for it."""

    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.count} CPU thread{'s' * (self.count > 1)}: {self.reason}"


def let_waiting_threads_sleep() -> None:
    """Keep waiting OpenMP threads from spinning, unless the user configured that.

    It affects this process, if it has not imported torch yet, and its children.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
        os.environ["KMP_BLOCKTIME"] = "0"  # ms, for LLVM's and Intel's OpenMP


def available_cores() -> Threads:
    """One thread for each core that this process may use, and what limits that."""
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
    """CPU limit of this process's control groups, in cores; None if there is none."""
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
    """The limit of one control group, if any: cpu.max (version 2) or cpu.cfs_quota_us (version 1)."""
    with suppress(OSError, ValueError):
        limit, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return [] if limit == "max" else [int(limit) / int(period)]
    with suppress(OSError, ValueError):
        limit, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
        return [] if int(limit) < 0 else [int(limit) / int(period)]
    return []


def choose(setting: int | None, width: int | None) -> Threads:
    """The threads for a model of hidden size ``width``, if it has one; ``setting`` is ``hardware.threads``."""
    if setting is not None:
        return Threads(setting, "hardware.threads")
    cores = available_cores()
    if width is not None and (useful := max(1, width // WIDTH)) < cores.count:
        return Threads(useful, f"a model this narrow gains nothing from all {cores.count} cores (hardware.threads=N)")
    return cores
