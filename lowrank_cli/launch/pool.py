"""Runs that are worked on side by side: what :class:`Workers` and :class:`LauncherPool` have in common."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from lowrank_cli.runs import PENDING, RUNNING, Run

LOCKS = ".devices"  #: in the folder of a sweep or study: the locks by which its processes share GPUs
NO_RESULT = "its process ended without a result"


class Pool(Protocol):
    """Works on prepared runs, each in a process of its own."""

    def run(self, folders: Sequence[Path], started: Callable[[Path], object], ended: Callable[[Path], object]) -> None:
        """Work on runs until each of them ended, well or badly, and tell of each when it starts and ends.

        A signal stops the runs as it would stop a single one, then raises KeyboardInterrupt.
        """


def record_death(run: Run, exit_code: int | None = None) -> None:
    """Say of a run whose process ended without a word how it ended.

    Args:
        exit_code: of the process, where it is known; negative for a signal.
    """
    if run.info["status"] in (PENDING, RUNNING):
        killed = exit_code is not None and exit_code < 0
        run.fail(f"its process was killed ({signal.Signals(-(exit_code or 0)).name})" if killed else NO_RESULT)
