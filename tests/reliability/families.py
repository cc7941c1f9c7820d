"""The families of trials, and how many of each are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import configurations, data, faults, given, kills, mutations, stops
from .box import Box
from .samples import Samples


@dataclass(frozen=True)
class Family:
    """Trials of one kind: ``trial`` returns the figures that it measured, if any."""

    title: str
    trial: Callable[[int, Box, Samples], dict[str, float] | None]
    bounded: int  #: trials that CI makes
    whole: int  #: trials of the whole campaign

    def trials(self, full: bool) -> int:
        return self.whole if full else self.bounded


FAMILIES = {
    "kills": Family("a training killed at random moments, then resumed", kills.trial, 6, 100),
    "mutations": Family("one file of a run, adapter, checkpoint, sweep or recipe changed", mutations.trial, 40, 1000),
    "configurations": Family("words typed by a user", configurations.trial, 100, 10_000),
    "data": Family("rows of a task, and prompts for many tenants", data.trial, 20, 500),
    "faults": Family("disks, permissions, streams and directories that fail", faults.trial, 9, 180),
    "stops": Family("SIGTERM, SIGINT and SIGUSR1 at random moments", stops.trial, 10, 160),
    "given": Family("folders made by others to act", given.trial, 20, 400),
}
