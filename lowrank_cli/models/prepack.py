"""Frozen linears on a CPU with their weights packed for oneDNN: the same outputs, to rounding, in less time.

Torch multiplies with the weight as it lies, and packs it anew for every batch of a few rows; while one token after the
other is written, that takes longer than the product. Here a packed copy is made once, when it is first needed: it takes
as much memory again as the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_cli.errors import UserError

#: Rows from which on the packed weight is faster (measured with AVX-512: 1.1 × the time at one row, 0.6 × at 8).
ROWS = 4


class Packed:
    """The packed form of one weight. Copies of a model that share the weight share it too."""

    def __init__(self) -> None:
        self._made_of: tuple[int, int] | None = None
        self._tensor: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self

    def of(self, weight: Tensor) -> Tensor:
        """``weight`` (O, I) packed, again where it has changed since."""
        now = weight.data_ptr(), weight._version
        if self._tensor is None or self._made_of != now:
            self._tensor, self._made_of = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None), now
        return self._tensor


class PrepackedLinear(nn.Linear):
    """A linear over the same weight and bias; with gradients, or few rows, it is computed as ever.

    So is one whose weight trains: a fused optimizer changes weights without a trace.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = Packed()

    def forward(self, x: Tensor) -> Tensor:
        recorded = torch.is_grad_enabled() or self.weight.requires_grad
        if recorded or x.numel() < ROWS * self.in_features or x.dtype != torch.float32:
            return F.linear(x, self.weight, self.bias)
        packed = self.packed.of(self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")


def prepack(model: nn.Module) -> None:
    """Replace every ``nn.Linear`` of ``model``; faster are those whose weight is frozen.

    Raises UserError where torch was built without oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        raise UserError("hardware.prepack: true, but this build of torch has no oneDNN; set hardware.prepack=false")
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PrepackedLinear(child))
