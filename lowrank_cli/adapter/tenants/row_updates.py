"""Low-rank updates that differ from row to row, by our own kernel, which reads the adapters' own factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_cli.adapter.spans import Span, put, take
from lowrank_cli.native.kernels import Kernels, RowUpdate, Updates


class RowUpdates:
    """y += w ⊙ B_o (A_o x), with the matrices of each row's owner o.

    Args:
        updates: those of the rows that have one.
        span: the output features that they cover; None means all.
        batch: B.
    """

    def __init__(self, kernels: Kernels, updates: Sequence[RowUpdate], span: Span | None, batch: int):
        self.kernels, self.updates, self.span, self.batch = kernels, Updates(updates), span, batch

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add the update for ``x``, (B, T, I) or (B * T, I), in place to the frozen output ``y``, likewise."""
        recorded = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        assert not recorded, "the kernels are for inference: autograd does not see what they add"
        tokens = x.numel() // (x.shape[-1] * self.batch)
        if self.span is None and y.dtype == x.dtype == torch.float32:  # the usual case, with little Python
            self.kernels.add_updates(self.updates, x, y, tokens)
            return
        y = y.view(-1, y.shape[-1])  # (B, T, O) -> (B * T, O)
        outputs = take(y, self.span)
        total = outputs.float()  # the same tensor, except under autocast
        self.kernels.add_updates(self.updates, x.float(), total, tokens)
        if total is not outputs:
            outputs.copy_(total)
        put(y, self.span, outputs)
