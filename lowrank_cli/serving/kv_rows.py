"""The KV cache of a batch that rows join and leave while it runs.

All rows end in the same column, so that the next token of each goes into the next column; shorter rows have padding on
the left, which the attention mask hides. Legend: ``B`` rows, ``H`` key-value heads, ``T`` columns, ``D`` head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SLACK = 64  #: spare columns of a new storage, at least


class RowLayer(DynamicLayer):
    """One layer: ``keys`` and ``values`` (B, H, T, D) are views of storages with room for more rows and columns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.width = self.end = 0  # rows, columns, and the column of the storage that follows them
        self.storages: list[Tensor] = []  # of keys and of values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens (B, H, t, D) and return those of all tokens."""
        assert len(key_states) == self.count, f"{len(key_states)} rows continue a cache of {self.count}"
        tokens = key_states.shape[-2]
        self._reserve((key_states, value_states), self.count, self.width, tokens)
        for storage, states in zip(self.storages, (key_states, value_states), strict=True):
            storage.narrow(0, 0, self.count).narrow(2, self.end, tokens).copy_(states)  # cheaper than indexing
        self.end += tokens
        return self._view(self.count, self.width + tokens)

    def join(self, states: tuple[Tensor, Tensor], sources: Sequence[int], lengths: Sequence[int], width: int) -> None:
        """Add rows.

        Args:
            states: keys and values (B', H, T', D), padded on the left.
            sources: for each new row, its row in ``states``.
            lengths: tokens of each new row.
            width: tokens of the longest row, old or new.
        """
        self._reserve(states, self.count + len(sources), width, 1)
        for storage, new in zip(self.storages, states, strict=True):
            storage[: self.count, :, self.end - width : self.end - self.width] = 0  # padding has to be finite
            for row, (source, length) in enumerate(zip(sources, lengths, strict=True), self.count):
                storage[row, :, self.end - width : self.end - length] = 0
                storage[row, :, self.end - length : self.end] = new[source, :, new.shape[-2] - length :]
        self._view(self.count + len(sources), width)

    def keep(self, moves: Sequence[tuple[int, int]], count: int, width: int) -> None:
        """Keep ``count`` rows and the last ``width`` columns, after moving rows (from, to)."""
        for storage in self.storages:
            for source, target in moves:
                storage[target, :, self.end - width : self.end] = storage[source, :, self.end - width : self.end]
        self._view(count, width)
        if not count:
            self.storages, self.end = [], 0

    def _view(self, count: int, width: int) -> tuple[Tensor, Tensor]:
        self.count, self.width = count, width
        keys, values = (storage.narrow(0, 0, count).narrow(2, self.end - width, width) for storage in self.storages)
        self.keys, self.values = keys, values
        return keys, values

    def _reserve(self, states: tuple[Tensor, Tensor], count: int, width: int, more: int) -> None:
        """Have storages for ``count`` rows, with ``width`` columns before ``end`` and ``more`` after it."""
        if self.storages:
            rows, _, columns, _ = self.storages[0].shape
            if count <= rows and width <= self.end and self.end + more <= columns:
                return
        else:
            self.lazy_initialization(*states)
        columns = width + more
        columns += max(SLACK, columns // 4)
        rows = count + count // 2
        storages = [new.new_zeros(rows, new.shape[1], columns, new.shape[3]) for new in states]
        for old, storage in zip(self.storages, storages):
            storage[: self.count, :, width - self.width : width] = old[
                : self.count, :, self.end - self.width : self.end
            ]
        self.storages, self.end = storages, width


class KVRows:
    """The cache of all layers, and the number of tokens in each row."""

    def __init__(self) -> None:
        self.cache = DynamicCache()
        self.lengths: list[int] = []
        self.layers: list[RowLayer] = []

    def join(self, prefilled: DynamicCache, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """Add rows of ``prefilled``, padded on the left; see :meth:`RowLayer.join`."""
        self.lengths += lengths
        if not self.layers:
            self.layers = [RowLayer() for _ in prefilled.layers]
            self.cache.layers = [*self.layers]
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            assert isinstance(source, DynamicLayer)
            if source.keys is not None and source.values is not None:  # None where layers share theirs
                layer.join((source.keys, source.values), sources, lengths, max(self.lengths))

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Keep ``rows``; returns them in their new order."""
        order = [row for row in rows if row < len(rows)]
        late = [row for row in rows if row >= len(rows)]
        holes = sorted(set(range(len(rows))) - set(order))
        moves = list(zip(late, holes, strict=True))
        by_target = {row: row for row in order} | {target: source for source, target in moves}
        order = [by_target[row] for row in range(len(rows))]
        self.lengths = [self.lengths[row] for row in order]
        for layer in self.layers:
            if layer.is_initialized:
                layer.keep(moves, len(rows), max(self.lengths, default=0))
        return order

    def inputs(self, tokens: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The inputs of a pass with one more token in each row: ids (B, 1), mask (B, T + 1), positions (B, 1).

        The pass itself extends the cache.
        """
        lengths = torch.tensor(self.lengths, device=device).unsqueeze(1)  # (B, 1)
        columns = torch.arange(max(self.lengths) + 1, device=device)  # (T + 1,)
        self.lengths = [length + 1 for length in self.lengths]
        return {
            "input_ids": torch.tensor(tokens, device=device).unsqueeze(1),  # (B, 1)
            "attention_mask": (columns >= len(columns) - 1 - lengths).long(),  # (B, T + 1)
            "position_ids": lengths,
        }
