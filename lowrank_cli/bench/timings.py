"""Rows, metrics and bars of benchmarks that measure nothing but time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_cli.bench.rounds import bars, flat, ratio, synchronized


@dataclass(frozen=True)
class Timing:
    """Seconds on the clock, and processor time of the process."""

    seconds: float
    cpu_seconds: float

    def scaled(self, factor: float) -> Timing:
        """That of ``factor`` times the work."""
        return Timing(self.seconds * factor, self.cpu_seconds * factor)


def timed(work: Callable[[], object], device: torch.device) -> Timing:
    """How long ``work`` takes, what it started on a GPU included."""
    synchronized(device)
    began, processor = time.perf_counter(), time.process_time()
    work()
    synchronized(device)
    return Timing(time.perf_counter() - began, time.process_time() - processor)


def rows(samples: Mapping[str, Sequence[Timing]], reference: str, **about: Any) -> list[dict[str, Any]]:
    """A row for each of ``samples``, with ratios to the one named ``reference``; ``about`` is part of every row."""
    found = []
    for name, own in samples.items():
        median, both = ratio(own, samples[reference], lambda sample: sample.seconds)
        row = {
            "method": name,
            "ms": 1000 * statistics.median(sample.seconds for sample in own),
            "cpu_ms": 1000 * statistics.median(sample.cpu_seconds for sample in own),
            "reference": reference,
            "time_ratio": median,
            "time_ratio_quartiles": both,
            "cpu_ratio": ratio(own, samples[reference], lambda sample: max(sample.cpu_seconds, 1e-9))[0],
            **about,
            "seconds": [sample.seconds for sample in own],
            "cpu_seconds": [sample.cpu_seconds for sample in own],
        }
        found.append(row)
    return found


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Flat numbers, ``bench/<what>/<number>``."""
    return flat(record, ("ms", "cpu_ms", "time_ratio", "cpu_ratio", "between_share"))


def figures(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bars of the time."""
    figure = bars(
        record,
        "time_ratio",
        file=f"{record['bench']['measure']}.png",
        title=f"{record['title']} ({record['device']})",
        columns=["time"],
        label=f"× {record['rows'][0]['reference']} (median, quartiles)",
    )
    return [figure]
