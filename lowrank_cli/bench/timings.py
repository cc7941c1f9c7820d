"""Rows, metrics and figures of benchmarks that measure only time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_cli.bench.memory import synchronized
from lowrank_cli.bench.rounds import bars, flat, ratio


@dataclass(frozen=True)
class Timing:
    """Wall-clock time, and processor time of the process, in seconds."""

    seconds: float
    cpu_seconds: float

    def scaled(self, factor: float) -> Timing:
        """The time of ``factor`` times the work."""
        return Timing(self.seconds * factor, self.cpu_seconds * factor)


def timed(work: Callable[[], object], device: torch.device) -> Timing:
    """How long ``work`` takes, including what it starts on a GPU."""
    synchronized(device)
    began, processor = time.perf_counter(), time.process_time()
    work()
    synchronized(device)
    return Timing(time.perf_counter() - began, time.process_time() - processor)


def rows(samples: Mapping[str, Sequence[Timing]], reference: str, **about: Any) -> list[dict[str, Any]]:
    """A row for each of ``samples``, with ratios to the one named ``reference``.

    Args:
        about: further entries of every row.
    """
    result = []
    for name, timings in samples.items():
        median, quartiles = ratio(timings, samples[reference], lambda sample: sample.seconds)
        row = {
            "method": name,
            "ms": 1000 * statistics.median(sample.seconds for sample in timings),
            "cpu_ms": 1000 * statistics.median(sample.cpu_seconds for sample in timings),
            "reference": reference,
            "time_ratio": median,
            "time_ratio_quartiles": quartiles,
            "cpu_ratio": ratio(timings, samples[reference], lambda sample: max(sample.cpu_seconds, 1e-9))[0],
            **about,
            "seconds": [sample.seconds for sample in timings],
            "cpu_seconds": [sample.cpu_seconds for sample in timings],
        }
        result.append(row)
    return result


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Flat numbers, ``bench/<method>/<key>``."""
    return flat(record, ("ms", "cpu_ms", "time_ratio", "cpu_ratio", "between_share"))


def figures(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A bar plot of the time ratios."""
    figure = bars(
        record,
        "time_ratio",
        file=f"{record['bench']['measure']}.png",
        title=f"{record['title']} ({record['device']})",
        columns=["time"],
        label=f"× {record['rows'][0]['reference']} (median, quartiles)",
    )
    return [figure]
