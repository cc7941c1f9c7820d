"""Low-rank updates that differ from row to row of a batch: one batched matrix product for each linear.

While decoding, rows of one owner form groups of n, so an owner's A and B are read once for n rows. Their operands stand
in a :class:`~lowrank_cli.adapter.tenants.operands.Operands`: gathering them at every call would cost more than the
products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from lowrank_cli.adapter.spans import Span, put, take
from lowrank_cli.adapter.tenants.row_updates import RowUpdates

#: Cost of reading an owner's A and B in a decoding step, in computed rows (measured on a CPU).
OPERANDS = 4


@dataclass(frozen=True)
class Grouping:
    """The rows of a batch that have an owner, in G padded groups of n rows."""

    owners: tuple[int, ...]  #: (G,), the owner of each group
    rows: tuple[int, ...]  #: (G * n,), rows of the batch; -1 is padding

    @property
    def in_order(self) -> bool:
        """Whether the groups list the rows of the batch in order."""
        return self.rows == tuple(range(len(self.rows)))

    def reordered(self, order: Sequence[int]) -> Grouping:
        """The groups ``order``."""
        if list(order) == sorted(order):
            return self
        size = len(self.rows) // len(self.owners)
        rows = (row for group in order for row in self.rows[group * size : (group + 1) * size])
        return Grouping(tuple(self.owners[group] for group in order), tuple(rows))


@lru_cache(maxsize=256)
def group(owners: tuple[int | None, ...], most: int | None = None) -> Grouping:
    """Group the rows of a batch by owner, with the n that minimises G · (OPERANDS + n), the cost of reads and padding.

    Args:
        owners: (B,), None for a row with nothing to add.
        most: upper bound of G, at least the number of owners.
    """
    rows: dict[int, list[int]] = {}
    for row, owner in enumerate(owners):
        if owner is not None:
            rows.setdefault(owner, []).append(row)
    counts = [len(owned) for owned in rows.values()]

    def groups(size: int) -> int:
        return sum(-(-count // size) for count in counts)

    sizes = [size for size in range(1, max(counts, default=1) + 1) if most is None or groups(size) <= most]
    size = min(sizes, key=lambda size: groups(size) * (OPERANDS + size))
    group_owners, order = [], []
    for owner, owned in rows.items():
        for start in range(0, len(owned), size):
            chunk = owned[start : start + size]
            group_owners.append(owner)
            order += chunk + [-1] * (size - len(chunk))
    return Grouping(tuple(group_owners), tuple(order))


class GroupedUpdate:
    """y += w ⊙ B_o (A_o x), with the matrices of each row's owner o.

    Args:
        a: (G, R, I), A of each group.
        b: (G, R, O), s · Bᵀ of each group.
        grouping: the groups.
        gates: w, (B,); None means 1.
        span: the output features that the update covers; None means all.
        batch: B.
    """

    def __init__(self, a: Tensor, b: Tensor, grouping: Grouping, gates: Tensor | None, span: Span | None, batch: int):
        self.rows: Tensor | None = None  # (G * n,)
        if not grouping.in_order or len(grouping.rows) < batch:
            self.rows = torch.tensor(grouping.rows, device=a.device).clamp_min(0)
        self.gate: Tensor | None = None  # (G * n, 1, 1)
        if gates is not None or -1 in grouping.rows:
            rows = torch.tensor(grouping.rows, device=a.device)
            gate = torch.ones_like(rows, dtype=a.dtype) if gates is None else gates.to(a.dtype)[rows.clamp_min(0)]
            self.gate = gate.masked_fill(rows < 0, 0).reshape(-1, 1, 1)
        self.a, self.b, self.span, self.batch = a, b, span, batch
        self._a_t = a.mT  # (G, I, R)
        ungated = self.gate is None and span is None
        #: Decoding steps stream all weights through the caches, which makes each operation and each view expensive:
        #: these cases get by with the fewest.
        self._one_group = len(a) == 1 and self.rows is None and span is None
        self._one_row_each = ungated and len(a) == len(grouping.rows)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add the update for ``x``, (B, T, I) or (B * T, I), in place to the frozen output ``y``, likewise."""
        if self._one_row_each and x.dim() == 3 and len(x) == self.batch:
            if self.rows is None:
                _add_products(y, torch.bmm(x, self._a_t), self.b)  # (G, T, I) @ (G, I, R) -> (G, T, R)
            else:
                h = torch.bmm(x.index_select(0, self.rows), self._a_t)  # (G, T, I) @ (G, I, R) -> (G, T, R)
                y.index_add_(0, self.rows, torch.bmm(h, self.b))
            return
        groups, rank, inputs = self.a.shape
        if self._one_group:
            h = x.reshape(-1, inputs) @ self._a_t[0]  # (B * T, I) @ (I, R) -> (B * T, R)
            if self.gate is not None:
                h = (h.view(self.batch, -1, rank) * self.gate).view(-1, rank)
            y.view(-1, y.shape[-1]).addmm_(h.to(y.dtype), self.b[0].to(y.dtype))
            return
        if self.rows is not None:
            x = x.reshape(self.batch, -1, inputs).index_select(0, self.rows)  # (B, T, I) -> (G * n, T, I)
        h = torch.bmm(x.reshape(groups, -1, inputs), self._a_t)  # (G, n * T, I) @ (G, I, R) -> (G, n * T, R)
        if self.gate is not None:
            h = (h.view(len(self.gate), -1, rank) * self.gate).view(groups, -1, rank)
        if self.rows is None:
            y = y.view(groups, -1, y.shape[-1])  # (B, T, O) -> (G, n * T, O)
            outputs = take(y, self.span)
            _add_products(outputs, h, self.b)
        else:
            y = y.view(self.batch, -1, y.shape[-1])  # (B, T, O)
            outputs = take(y, self.span)
            outputs.index_add_(0, self.rows, torch.bmm(h, self.b).view(len(self.rows), -1, outputs.shape[-1]))
        put(y, self.span, outputs)


def _add_products(y: Tensor, h: Tensor, b: Tensor) -> None:
    """``y`` (G, T, O) += ``h`` (G, T, R) @ ``b`` (G, R, O), in place, in the dtype of ``y`` even under autocast."""
    h, b = h.to(y.dtype), b.to(y.dtype)
    if y.is_contiguous():
        y.baddbmm_(h, b)
    else:
        y += torch.bmm(h, b)  # baddbmm_ would copy a slice back and forth


class GroupedLinear(nn.Module):
    """A frozen linear with the grouped updates of the running batch."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.updates: dict[Span | None, GroupedUpdate | RowUpdates] = {}  # by span

    @property
    def weight(self) -> Tensor:
        """The base's weight; some models read its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for update in self.updates.values():
            update.add_to(y, x)
        return y
