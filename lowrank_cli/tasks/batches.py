"""Which examples make up which training step: pure functions, so that a resumed run sees the same data.

Global step ``s`` (from 0) of a training set with ``n`` batches an epoch is batch ``s % n`` of epoch
``s // n``. Processes and gradient accumulation split a batch and do not change its examples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 50  #: batches whose examples are sorted by length together; more saves padding, fewer mix better


def batch_indices(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, window: int = WINDOW
) -> list[list[int]]:
    """One epoch of batches of similar lengths, in random order; every index occurs exactly once.

    Examples are shuffled, cut into windows of ``window`` batches, sorted by length within each, and the
    batches shuffled. With a window of 1 a batch is a random draw. An incomplete batch comes last.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    full = len(order) - len(order) % batch_size
    batches = []
    for start in range(0, full, window * batch_size):
        end = min(start + window * batch_size, full)
        by_length = sorted(order[start:end], key=lambda index: lengths[index])
        batches += [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
    rng.shuffle(batches)
    return batches + ([order[full:]] if full < len(order) else [])


class Batches:
    """The batch of every global step, for any number of epochs: ``batches[step]``; ``len`` is the batches an epoch."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, window: int = WINDOW):
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __getitem__(self, step: int) -> list[int]:
        epoch, position = divmod(step, len(self))
        if self._epoch[0] != epoch:
            self._epoch = epoch, batch_indices(self.lengths, self.batch_size, self.seed, epoch, self.window)
        return self._epoch[1][position]


@dataclass(frozen=True)
class Share:
    """One micro-batch of one process."""

    indices: list[int]  #: never empty
    counts: bool  #: False for a filler that keeps processes in step; its loss is multiplied by zero


def share(batch: Sequence[int], rank: int, world: int, accumulation: int) -> list[Share]:
    """The ``accumulation`` micro-batches of process ``rank`` of ``world``.

    The shares that count hold every index of ``batch`` exactly once. If a batch has fewer examples than
    micro-batches (an epoch's last), copies of its first example that do not count fill it up.
    """
    shares = []
    for micro in range(accumulation):
        indices = list(batch[rank * accumulation + micro :: world * accumulation])
        shares.append(Share(indices, True) if indices else Share([batch[0]], False))
    return shares


def padding(lengths: Sequence[int], batches: Batches, steps: int, world: int, accumulation: int) -> float:
    """The share of padding among the positions of the first ``steps`` batches, each micro-batch as long as its longest
    example."""
    tokens = positions = 0
    for step in range(steps):
        for rank in range(world):
            for micro in share(batches[step], rank, world, accumulation):
                rows = [lengths[index] for index in micro.indices]
                tokens += sum(rows)
                positions += len(rows) * max(rows)
    return 1 - tokens / positions
