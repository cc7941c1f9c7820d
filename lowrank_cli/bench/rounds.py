"""How every benchmark takes its samples and compares them: interleaved rounds, and ratios within a round.

Each round measures everything once, so that what slows the machine down for a while slows all of it. A ratio is taken
within a round; reported are the median over the rounds and the quartiles.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from lowrank_cli.bench.shared_weights import Twin
from lowrank_cli.inference.progress import Bar
from lowrank_cli.runs.process import peak_memory_bytes, reset_peak_memory, resident_bytes

S = TypeVar("S")


class HasMemory(Protocol):
    memory: int  #: peak, in bytes


M = TypeVar("M", bound=HasMemory)


def interleaved(work: Mapping[str, Callable[[], S]], rounds: int, bar: Bar) -> dict[str, list[S]]:
    """The samples that each of ``work`` returns, round by round.

    The order rotates and alternates from round to round, so that none always follows the same other one. A first round
    is not counted.
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
    models: Mapping[str, Twin], present: Iterable[Twin], rounds: int, sample: Callable[[Twin], M], bar: Bar
) -> dict[str, list[M]]:
    """Interleaved samples of each model, without the memory that the others ``present`` hold."""
    holders = list({id(twin.model): twin for twin in present if not twin.apart}.values())

    def take(twin: Twin) -> M:
        others = 0 if twin.apart else sum(other.held_bytes() for other in holders if other.model is not twin.model)
        taken = sample(twin)
        taken.memory -= others
        return taken

    return interleaved({name: partial(take, twin) for name, twin in models.items()}, rounds, bar)


def ratio(samples: Sequence[S], reference: Sequence[S], of: Callable[[S], float]) -> tuple[float, list[float]]:
    """Median and quartiles of ``of`` a sample over ``of`` the reference's sample of the same round."""
    ratios = [of(own) / of(other) for own, other in zip(samples, reference, strict=True)]
    return statistics.median(ratios), quartiles(ratios)


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower and the upper one."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return [low, high]


def flat(record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, float]:
    """Flat numbers, ``bench/<method>/<key>``, of the rows of a benchmark's record."""
    return {f"bench/{row['method']}/{key}": row[key] for row in record["rows"] for key in keys if key in row}


def bars(record: Mapping[str, Any], key: str, **about: Any) -> dict[str, Any]:
    """A bar for each row: the ratio at ``key``, with its quartiles; ``about`` is what else the figure says."""
    rows = record["rows"]
    return {
        "kind": "bars",
        "rows": [row["method"] for row in rows],
        "values": [[row[key]] for row in rows],
        "low": [[row[f"{key}_quartiles"][0]] for row in rows],
        "high": [[row[f"{key}_quartiles"][1]] for row in rows],
        **about,
    }


def synchronized(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held_memory(device: torch.device) -> int:
    """Bytes in use now: allocated on a GPU, resident in the process otherwise."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def reset_peak(device: torch.device) -> None:
    """Let :func:`peak_memory` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak_memory()


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU, resident in the process otherwise."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def memory_meaning(device: torch.device, of: str) -> str:
    """What the peak memory of a benchmark's rows is; ``of`` names what was measured."""
    what = "largest allocation on the device" if device.type == "cuda" else "largest resident size of the process"
    return f"{what} during a {of}, without the other methods' adapters"
