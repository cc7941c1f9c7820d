"""Adapted linears that read one input (query, key and value; gate and up): in training, one computes for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lowrank_cli.adapter.fused_autograd import Frozen, Remake, outputs

if TYPE_CHECKING:
    from lowrank_cli.adapter.linear import AdaptedLinear


class Siblings:
    """The first linear to be called with an input computes the outputs of all; the others take theirs when called.

    An output waits for its own linear and the same tensor, unchanged; anything else is computed anew. So a sibling that
    is never called, or with another input, costs time, and memory until the next input comes. Weights and gates are
    taken not to change between the calls with one input, which a model makes within one forward pass.
    """

    def __init__(self, *linears: AdaptedLinear):
        self.linears = list(linears)
        self._x: Tensor | None = None
        self._version = 0
        self._waiting: dict[AdaptedLinear, Tensor] = {}

    def add(self, linear: AdaptedLinear) -> None:
        """Take in a ``linear`` that was alone."""
        linear.siblings = self
        self.linears.append(linear)

    def remove(self, linear: AdaptedLinear) -> None:
        """Let go of ``linear``, which is alone then."""
        self.linears = [other for other in self.linears if other is not linear]
        self._waiting = {}
        linear.siblings = Siblings(linear)

    def output(self, linear: AdaptedLinear, x: Tensor, remake: Remake | None) -> Tensor | None:
        """y (B, T, O) of ``linear`` for ``x`` (B, T, I), with what its updates add; None where it cannot be fused.

        ``remake`` computes ``x`` again, so that it need not be saved.
        """
        if x is not self._x or x._version != self._version or linear not in self._waiting:
            self._compute(linear, x, remake)
        found = self._waiting.pop(linear, None)
        if not self._waiting:
            self._x = None
        return found

    def _compute(self, linear: AdaptedLinear, x: Tensor, remake: Remake | None) -> None:
        self._x, self._waiting = None, {}
        own = linear.fusible(x)
        if own is None:
            return
        found: dict[AdaptedLinear, Frozen] = {linear: own}
        for other in self.linears:
            frozen = None if other is linear else other.fusible(x)
            if frozen is not None and frozen.dropout == own.dropout:
                found[other] = frozen
        self._waiting = dict(zip(found, outputs(x, list(found.values()), remake), strict=True))
        self._x, self._version = x, x._version
