"""How every benchmark takes its samples and compares them: interleaved rounds, and ratios within a round.

Each round measures every method once, so that a slow phase of the machine affects all of them. Ratios are taken within
a round; their median and quartiles over the rounds are reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from lowrank_cli.bench.bench_models import BenchModel
from lowrank_cli.runs.progress import Bar

S = TypeVar("S")


class HasMemory(Protocol):
    memory: int  #: peak, in bytes


M = TypeVar("M", bound=HasMemory)


def interleaved(work: Mapping[str, Callable[[], S]], rounds: int, bar: Bar) -> dict[str, list[S]]:
    """The samples that each function of ``work`` returns, round by round.

    The order rotates and reverses from round to round, so that none always follows the same other one. One more round
    comes first, as a warm-up.
    """
    names = list(work)
    samples: dict[str, list[S]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for name in order if number % 2 else reversed(order):
            sample = work[name]()
            if number:
                samples[name].append(sample)
            bar.advance()
    return samples


def in_turns(
    models: Mapping[str, BenchModel],
    present: Iterable[BenchModel],
    rounds: int,
    sample: Callable[[BenchModel], M],
    bar: Bar,
) -> dict[str, list[M]]:
    """Interleaved samples of each model.

    Args:
        present: all models in memory; what the others hold is subtracted from a sample's memory.
    """
    holders = list(
        {id(bench_model.model): bench_model for bench_model in present if not bench_model.separate_process}.values()
    )

    def take(bench_model: BenchModel) -> M:
        others = (
            0
            if bench_model.separate_process
            else sum(other.held_bytes() for other in holders if other.model is not bench_model.model)
        )
        taken = sample(bench_model)
        taken.memory -= others
        return taken

    return interleaved({name: partial(take, bench_model) for name, bench_model in models.items()}, rounds, bar)


def ratio(samples: Sequence[S], reference: Sequence[S], of: Callable[[S], float]) -> tuple[float, list[float]]:
    """Median and quartiles over the rounds of ``of(sample) / of(reference sample)``."""
    ratios = [of(sample) / of(other) for sample, other in zip(samples, reference, strict=True)]
    return statistics.median(ratios), quartiles(ratios)


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower and the upper quartile."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return [low, high]


def flat(record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, float]:
    """The values of ``keys`` in the rows of a benchmark's record, as ``bench/<method>/<key>``."""
    return {f"bench/{row['method']}/{key}": row[key] for row in record["rows"] for key in keys if key in row}


def bars(record: Mapping[str, Any], key: str, **about: Any) -> dict[str, Any]:
    """A bar plot of the ratios at ``key``, with quartiles.

    Args:
        about: further entries of the figure, such as ``file``, ``title`` and ``label``.
    """
    rows = record["rows"]
    return {
        "kind": "bars",
        "rows": [row["method"] for row in rows],
        "values": [[row[key]] for row in rows],
        "low": [[row[f"{key}_quartiles"][0]] for row in rows],
        "high": [[row[f"{key}_quartiles"][1]] for row in rows],
        **about,
    }
