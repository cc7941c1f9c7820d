"""Reuse of what an ablation leaves unchanged: earlier layers, and earlier linears of the same layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.lm_head import replaced_forwards
from lowrank_cli.adapter.sharded import sharded
from lowrank_cli.adapter.target_sites import layers, structure_of
from lowrank_cli.scoring.answer_positions import StopForward, attention_of, role_paths
from lowrank_cli.scoring.probe import Batch, row_losses, tile

#: The order in which a layer computes its roles; equal numbers do not depend on each other.
ROLE_ORDER = {"Q": 0, "K": 0, "V": 0, "O": 1, "G": 2, "U": 2, "D": 3}


class Reuse:
    """One forward pass of ``batch`` (n rows), recorded for ablations of any layer.

    Holds the input (n, T, D) of every layer, and for one layer at a time the outputs of its attention and linears.
    """

    def __init__(self, adapter: Adapter, batch: Batch):
        self.model, self.batch = adapter.model, batch
        structure = structure_of(self.model)
        known = layers(self.model) if structure and structure.position_wise else []
        self.last = len(known) - 1  #: index of the last layer; -1: what it computes at which positions is not known
        self.blocks = [] if sharded(self.model) else known  # a pass must not end before all layers were gathered
        self.inputs: list[Tensor] = []
        self.extras: list[int | None] = []  # number of values a layer returns besides the states; None: no tuple
        self.layer: int | None = None  # the layer whose outputs are recorded
        hooks = [block.register_forward_pre_hook(self._record_input, with_kwargs=True) for block in self.blocks]
        hooks += [block.register_forward_hook(self._record_extras) for block in self.blocks]
        try:
            self.losses = row_losses(self.model, batch)  # (n,)
        finally:
            for hook in hooks:
                hook.remove()

    def _record_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.inputs.append(args[0] if args else kwargs["hidden_states"])

    def _record_extras(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.extras.append(len(output) - 1 if isinstance(output, tuple) else None)

    def _record_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module not in self.outputs:  # attention of the last layer is called again, for answers only
            self.outputs[module] = output.clone() if isinstance(output, Tensor) else output  # updates are in place

    def _record_layer(self, index: int) -> None:
        """Record the outputs inside layer ``index``."""
        self.linears = {path: ROLE_ORDER[role] for role, path in role_paths(self.model, index).items()}
        self.attention = attention_of(self.model, index)
        modules = [self.model.get_submodule(path) for path in self.linears]
        modules += [module.base for module in modules if isinstance(module, AdaptedLinear)]
        self.outputs: dict[nn.Module, Any] = {}
        hooks = [module.register_forward_hook(self._record_output) for module in (*modules, self.attention)]
        hooks.append(self.blocks[index].register_forward_hook(_stop))
        try:
            with replaced_forwards(self._skip_before(index, 1)), suppress(StopForward):
                row_losses(self.model, self.batch)
        finally:
            for hook in hooks:
                hook.remove()
        self.layer = index

    def known(self, index: int | None, order: int, ablated: set[str], times: int) -> dict[nn.Module, Callable]:
        """Forwards that return recorded outputs, for ``times`` copies of the batch.

        Empty if ``index`` is None, or if layers may mix positions outside attention.

        Args:
            index: the layer of the ablated linears.
            order: their place in :data:`ROLE_ORDER`.
            ablated: their paths; their frozen linears still return recorded outputs.
        """
        if index is None or not self.blocks:
            return {}
        if index != self.layer:
            self._record_layer(index)
        answers = self._skip_before(index, times)
        if order > ROLE_ORDER["O"]:
            answers[self.attention] = _constant(self.outputs[self.attention], times)
        for path, own_order in self.linears.items():
            module = self.model.get_submodule(path)
            if path in ablated and isinstance(module, AdaptedLinear):
                assert isinstance(module.base, nn.Module)
                answers[module.base] = _constant(self.outputs[module.base], times)
            elif own_order <= order:
                answers[module] = _constant(self.outputs[module], times)
        return answers

    def _skip_before(self, index: int, times: int) -> dict[nn.Module, Callable]:
        """Forwards that skip the layers before ``index``; the last one returns the recorded states."""
        answers: dict[nn.Module, Callable] = {}
        for at in range(index):
            hidden = tile(self.inputs[index], times) if at == index - 1 else self.inputs[at]
            extras = self.extras[at]
            whole = hidden if extras is None else (hidden, *[None] * extras)
            answers[self.blocks[at]] = lambda *args, whole=whole, **kwargs: whole
        return answers


def _stop(module: nn.Module, args: tuple, output: Any) -> None:
    raise StopForward


def _constant(output: Any, times: int) -> Callable:
    """A forward that returns ``times`` copies of a recorded output; of a tuple only the first value.

    A linear's output is flat, or has separate rows and tokens, like its input.
    """

    def answer(*args: Tensor, **kwargs: Any) -> Any:
        if not isinstance(output, Tensor):
            return tile(output[0], times), *[None] * (len(output) - 1)
        copy = tile(output, times)
        return copy.reshape(*args[0].shape[:-1], -1) if args else copy

    return answer
