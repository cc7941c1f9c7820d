"""The operands of a batched product: the factors of a batch's adapters at one site, next to each other in memory."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """What one group of rows multiplies with."""

    a: Tensor  #: A (R, I)
    b: Tensor  #: s · Bᵀ (R, O)
    gate: float = 1.0  #: scales B


class Operands:
    """Factors of different ranks as A (G, R, I) and s · Bᵀ (G, R, O), padded with zeros.

    The storage stays, with what it holds, for the next batch: where rows join and leave one by one, only the factors of
    the new ones are copied. It does not keep adapters alive.
    """

    def __init__(self) -> None:
        self._held: list[tuple[weakref.ref[Tensor], float]] = []  # A and gate of each slot
        self._a, self._b = torch.empty(0, 0, 0), torch.empty(0, 0, 0)

    def of(self, groups: Sequence[Factors], in_order: bool = True) -> tuple[Tensor, Tensor, list[int]]:
        """A and s · Bᵀ of ``groups``, and which of them each slot holds. A single group gives views of its factors.

        Args:
            in_order: whether slot i has to hold group i; otherwise those that are held stay where they are.
        """
        if len(groups) == 1:
            a, b, gate = groups[0]
            return a.unsqueeze(0), (b if gate == 1 else b * gate).unsqueeze(0), [0]  # (R, X) -> (1, R, X)
        rank = max(group.a.size(0) for group in groups)
        self._reserve(groups[0], len(groups), rank)
        order = list(range(len(groups))) if in_order else self._order(groups)
        for slot, group in enumerate(order):
            self._hold(slot, groups[group])
        return self._a[: len(groups), :rank], self._b[: len(groups), :rank], order

    def _reserve(self, like: Factors, count: int, rank: int) -> None:
        """Have storage for ``count`` groups of ``rank``."""
        slots, ranks, _ = self._a.shape
        if count > slots or rank > ranks:
            self._held = []
            self._a = like.a.new_empty(max(count, slots), max(rank, ranks), like.a.shape[1])
            self._b = like.b.new_empty(max(count, slots), max(rank, ranks), like.b.shape[1])

    def _order(self, groups: Sequence[Factors]) -> list[int]:
        """For each slot a group: the one that it holds, or one that no slot does."""
        left: dict[tuple[int, float], list[int]] = defaultdict(list)
        for number, group in enumerate(groups):
            left[id(group.a), group.gate].append(number)
        order = [-1] * len(groups)
        for slot, (held, gate) in enumerate(self._held[: len(groups)]):
            if same := left.get((id(held()), gate)):
                order[slot] = same.pop(0)
        rest = (number for numbers in left.values() for number in numbers)
        return [next(rest) if number < 0 else number for number in order]

    def _hold(self, slot: int, group: Factors) -> None:
        """Copy ``group`` into a slot that does not hold it already."""
        if slot < len(self._held) and self._held[slot][0]() is group.a and self._held[slot][1] == group.gate:
            return
        a, b, rank = self._a[slot], self._b[slot], group.a.size(0)
        a[:rank], a[rank:] = group.a, 0
        b[:rank], b[rank:] = group.b, 0
        if group.gate != 1:
            b[:rank] *= group.gate
        self._held[slot : slot + 1] = [(weakref.ref(group.a), group.gate)]
