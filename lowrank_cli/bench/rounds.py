"""How a benchmark takes its samples: every method once a round, and what the device says of time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

import torch

from lowrank_cli.bench.shared_weights import Twin
from lowrank_cli.inference.progress import Bar
from lowrank_cli.runs.process import peak_memory_bytes, reset_peak_memory, resident_bytes


class Sampled(Protocol):
    memory: int  #: peak, in bytes


S = TypeVar("S", bound=Sampled)


def in_turns(
    models: Mapping[str, Twin], present: Iterable[Twin], rounds: int, sample: Callable[[Twin], S], bar: Bar
) -> dict[str, list[S]]:
    """The samples of each method, round by round; what others of those ``present`` hold is no part of its memory.

    The order rotates from round to round, and a first round is not counted.
    """
    holders = list({id(twin.model): twin for twin in present if not twin.apart}.values())
    names = list(models)
    found: dict[str, list[S]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for name in order if number % 2 else reversed(order):  # so that none always follows the same other one
            others = sum(twin.held_bytes() for twin in holders if twin.model is not models[name].model)
            taken = sample(models[name])
            taken.memory -= 0 if models[name].apart else others
            if number:
                found[name].append(taken)
            bar.advance()
    return found


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
