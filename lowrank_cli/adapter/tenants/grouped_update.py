"""Low-rank updates that differ from row to row of a batch: one batched matrix product for each linear.

Rows of one owner stand together in groups of n, so that an owner's A and B are read once for n rows. The operands are
gathered once when a batch starts: gathering at every call would cost more than the products.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from lowrank_cli.adapter.spans import Span, put, take
from lowrank_cli.errors import UserError

#: What reading an owner's A and B costs in a decoding step: as much as computing so many rows (measured on a CPU).
OPERANDS = 4


@dataclass(frozen=True)
class Grouping:
    """The rows of a batch that have an owner, in G groups of n rows; a group that is too short is filled up."""

    owners: tuple[int, ...]  #: of each group, (G,)
    rows: tuple[int, ...]  #: of the batch, (G * n,); -1 fills up

    @property
    def in_order(self) -> bool:
        """Whether the groups are the batch as it stands."""
        return self.rows == tuple(range(len(self.rows)))


@lru_cache(maxsize=256)
def group(owners: tuple[int | None, ...], most: int | None = None) -> Grouping:
    """Groups of the rows, whose ``owners`` (B,) are None where there is nothing to add.

    n makes G · (OPERANDS + n) smallest: few reads, and few rows that only fill up. G is ``most`` at most, which is no
    less than the owners.
    """
    rows: dict[int, list[int]] = {}
    for row, owner in enumerate(owners):
        if owner is not None:
            rows.setdefault(owner, []).append(row)
    counts = [len(own) for own in rows.values()]

    def groups(size: int) -> int:
        return sum(-(-count // size) for count in counts)

    sizes = [size for size in range(1, max(counts, default=1) + 1) if most is None or groups(size) <= most]
    size = min(sizes, key=lambda size: groups(size) * (OPERANDS + size))
    found, order = [], []
    for owner, own in rows.items():
        for start in range(0, len(own), size):
            part = own[start : start + size]
            found.append(owner)
            order += part + [-1] * (size - len(part))
    return Grouping(tuple(found), tuple(order))


def stacked(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Matrices (R, X) of unlike ranks as one tensor (G, max R, X) on ``device``, zeros below; of one a view."""
    if len(parts) == 1:
        return parts[0].to(device).unsqueeze(0)  # (R, X) -> (1, R, X)
    rank = max(len(part) for part in parts)
    whole = parts[0].new_empty(len(parts), rank, parts[0].shape[1], device=device)
    for matrix, part in zip(whole, parts):
        matrix[: len(part)] = part
        matrix[len(part) :] = 0
    return whole


class GroupedUpdate:
    """y += w ⊙ B_o (A_o x), with the matrices of each row's owner o.

    ``a`` (G, R, I) and ``b`` (G, R, O) belong to the groups of ``grouping``, with the scale in ``b``; ``gates`` (B,)
    are w, None where all are 1. ``span`` is the part of the output that the update covers, None for all of it.
    """

    def __init__(self, a: Tensor, b: Tensor, grouping: Grouping, gates: Tensor | None, span: Span | None, batch: int):
        rows = torch.tensor(grouping.rows, device=a.device)
        self.rows = None if grouping.in_order and len(rows) == batch else rows.clamp_min(0)  # (G * n,)
        self.gate: Tensor | None = None  # (G * n, 1, 1)
        if gates is not None or -1 in grouping.rows:
            gate = torch.ones_like(rows, dtype=a.dtype) if gates is None else gates.to(a.dtype)[rows.clamp_min(0)]
            self.gate = gate.masked_fill(rows < 0, 0).reshape(-1, 1, 1)
            if len(rows) == len(b):  # a group is one row: its gate may as well stand in its operand
                b, self.gate = b * self.gate, None  # (G, R, O)
        self.a, self.b, self.span, self.batch = a.mT, b, span, batch
        #: nothing to do but two products, where a group is one row
        self.direct = self.rows is None and self.gate is None and span is None

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add in place to ``y`` (B, T, O) or (B * T, O), the frozen output for ``x`` (B, T, I) or (B * T, I)."""
        if self.direct and x.dim() == 3 and len(x) == len(self.a):
            _add_products(y, torch.bmm(x, self.a), self.b)  # (G, T, I) @ (G, I, R) -> (G, T, R)
            return
        groups, inputs, rank = self.a.shape
        if self.rows is not None:
            x = x.reshape(self.batch, -1, inputs).index_select(0, self.rows)  # (B, T, I) -> (G * n, T, I)
        h = torch.bmm(x.reshape(groups, -1, inputs), self.a)  # (G, n * T, I) @ (G, I, R) -> (G, n * T, R)
        if self.gate is not None:
            h = (h.view(len(self.gate), -1, rank) * self.gate).view(groups, -1, rank)
        if self.rows is None:
            y = y.view(groups, -1, y.shape[-1])  # (B, T, O) -> (G, n * T, O)
            own = take(y, self.span)
            _add_products(own, h, self.b)
        else:
            y = y.view(self.batch, -1, y.shape[-1])  # (B, T, O)
            own = take(y, self.span)
            own.index_add_(0, self.rows, torch.bmm(h, self.b).view(len(self.rows), -1, own.shape[-1]))
        put(y, self.span, own)


def _add_products(y: Tensor, h: Tensor, b: Tensor) -> None:
    """``y`` (G, T, O) += ``h`` (G, T, R) @ ``b`` (G, R, O), in place; autocast leaves it alone."""
    h, b = h.to(y.dtype), b.to(y.dtype)
    if y.is_contiguous():
        y.baddbmm_(h, b)
    else:
        y += torch.bmm(h, b)  # baddbmm_ would copy a slice, such as of a packed product, there and back


def require_grouped(grouped: str) -> None:
    """Raise UserError where what ``hardware.grouped`` asks for is missing."""
    if grouped == "triton" and importlib.util.find_spec("triton") is None:
        raise UserError("hardware.grouped: triton needs the package triton; install it, or set hardware.grouped=torch")


def update_kind(grouped: str) -> type[GroupedUpdate]:
    """What computes updates as ``hardware.grouped`` says: ``torch`` (this file) or ``triton`` (CUDA only)."""
    if grouped == "torch":
        return GroupedUpdate
    assert grouped == "triton"
    from lowrank_cli.adapter.tenants.grouped_triton import TritonUpdate

    return TritonUpdate


class GroupedLinear(nn.Module):
    """A frozen linear with the grouped updates of the batch that runs."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.updates: dict[Span | None, GroupedUpdate] = {}  # by the span that each covers

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models read it for its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for update in self.updates.values():
            update.add_to(y, x)
        return y
