"""Adapted linears that read the same input (Q, K and V; G and U): in training, one call computes all of them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lowrank_cli.adapter.fused_autograd import FrozenLinear, Recompute, fused_outputs


class Fusible(Protocol):
    """A linear of an :class:`InputGroup`."""

    input_group: InputGroup

    def fusible(self, x: Tensor) -> FrozenLinear | None:
        """The linear and its updates for ``x``; None if they cannot be fused."""
        ...


class InputGroup:
    """The first linear called with an input computes the outputs of the whole group; the others pick theirs up.

    An output is picked up only by its own linear and with the same unchanged tensor; anything else is computed anew.
    A linear that is never called, or with another input, costs time, and memory until the next input. Weights and
    gates must not change between the calls with one input.
    """

    def __init__(self, *linears: Fusible):
        self.linears = list(linears)
        self._x: Tensor | None = None
        self._version = 0
        self._outputs: dict[Fusible, Tensor] = {}  # those not picked up yet

    def add(self, linear: Fusible) -> None:
        """Add ``linear``, which was alone in its group."""
        linear.input_group = self
        self.linears.append(linear)

    def remove(self, linear: Fusible) -> None:
        """Remove ``linear``, which gets a group of its own."""
        self.linears = [other for other in self.linears if other is not linear]
        self._outputs = {}
        linear.input_group = InputGroup(linear)

    def output(self, linear: Fusible, x: Tensor, recompute: Recompute | None) -> Tensor | None:
        """y (B, T, O) of ``linear`` for ``x`` (B, T, I), updates included; None if it cannot be fused.

        ``recompute`` computes ``x`` again in the backward pass, so that it is not saved.
        """
        if x is not self._x or x._version != self._version or linear not in self._outputs:
            self._compute(linear, x, recompute)
        result = self._outputs.pop(linear, None)
        if not self._outputs:
            self._x = None
        return result

    def _compute(self, linear: Fusible, x: Tensor, recompute: Recompute | None) -> None:
        self._x, self._outputs = None, {}
        first = linear.fusible(x)
        if first is None:
            return
        group: dict[Fusible, FrozenLinear] = {linear: first}
        for other in self.linears:
            frozen = None if other is linear else other.fusible(x)
            if frozen is not None and frozen.dropout == first.dropout:
                group[other] = frozen
        self._outputs = dict(zip(group, fused_outputs(x, list(group.values()), recompute), strict=True))
        self._x, self._version = x, x._version
