"""What an ablation leaves unchanged is computed once: the layers in front, and the linears in front within a layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.lm_head import replaced_forwards
from lowrank_cli.adapter.target_sites import layers, structure_of
from lowrank_cli.scoring.answer_positions import Done, attention_of, role_paths
from lowrank_cli.scoring.probe import Batch, row_losses, tile

#: The order in which a layer computes its roles; those with the same number do not depend on each other.
STAGES = {"Q": 0, "K": 0, "V": 0, "O": 1, "G": 2, "U": 2, "D": 3}


class Reuse:
    """One forward pass of ``batch`` (n rows), remembered as far as ablations of any layer need it.

    It holds the hidden states in front of every layer, (n, T, D) each, and of one layer at a time the outputs of its
    attention and of its linears.
    """

    def __init__(self, adapter: Adapter, batch: Batch):
        self.model, self.batch = adapter.model, batch
        structure = structure_of(self.model)
        self.blocks = layers(self.model) if structure and structure.position_wise else []
        self.inputs: list[Tensor] = []
        self.extras: list[int | None] = []  # how many values a layer returns beside the states; None: no tuple
        self.layer: int | None = None  # whose inside is remembered
        hooks = [block.register_forward_pre_hook(self._note_input, with_kwargs=True) for block in self.blocks]
        hooks += [block.register_forward_hook(self._note_extras) for block in self.blocks]
        try:
            self.losses = row_losses(self.model, batch)  # (n,)
        finally:
            for hook in hooks:
                hook.remove()

    def _note_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.inputs.append(args[0] if args else kwargs["hidden_states"])

    def _note_extras(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.extras.append(len(output) - 1 if isinstance(output, tuple) else None)

    def _note_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module not in self.outputs:  # attention of the last layer is called again, for answers only
            self.outputs[module] = output.clone() if isinstance(output, Tensor) else output  # updates come in place

    def _enter(self, index: int) -> None:
        """Remember the inside of layer ``index``."""
        self.linears = {path: STAGES[role] for role, path in role_paths(self.model, index).items()}
        self.attention = attention_of(self.model, index)
        modules = [self.model.get_submodule(path) for path in self.linears]
        modules += [module.base for module in modules if isinstance(module, AdaptedLinear)]
        self.outputs: dict[nn.Module, Any] = {}
        hooks = [module.register_forward_hook(self._note_output) for module in (*modules, self.attention)]
        hooks.append(self.blocks[index].register_forward_hook(_stop))
        try:
            with replaced_forwards(self._in_front(index, 1)), suppress(Done):
                row_losses(self.model, self.batch)
        finally:
            for hook in hooks:
                hook.remove()
        self.layer = index

    def known(self, index: int | None, stage: int, ablated: set[str], times: int) -> dict[nn.Module, Callable]:
        """What need not be computed in ``times`` copies of the batch where linears ``ablated`` of one stage differ.

        ``index`` is their layer. Nothing is known where it is None, or where layers may mix positions outside
        attention. An ablated linear keeps its frozen part's output.
        """
        if index is None or not self.blocks:
            return {}
        if index != self.layer:
            self._enter(index)
        answers = self._in_front(index, times)
        if stage > STAGES["O"]:
            answers[self.attention] = _constant(self.outputs[self.attention], times)
        for path, own in self.linears.items():
            module = self.model.get_submodule(path)
            if path in ablated and isinstance(module, AdaptedLinear):
                assert isinstance(module.base, nn.Module)
                answers[module.base] = _constant(self.outputs[module.base], times)
            elif own <= stage:
                answers[module] = _constant(self.outputs[module], times)
        return answers

    def _in_front(self, index: int, times: int) -> dict[nn.Module, Callable]:
        """Layers in front of ``index`` do nothing, and the last of them hands over the remembered states."""
        answers: dict[nn.Module, Callable] = {}
        for at in range(index):
            hidden = tile(self.inputs[index], times) if at == index - 1 else self.inputs[at]
            extras = self.extras[at]
            whole = hidden if extras is None else (hidden, *[None] * extras)
            answers[self.blocks[at]] = lambda *args, whole=whole, **kwargs: whole
        return answers


def _stop(module: nn.Module, args: tuple, output: Any) -> None:
    raise Done


def _constant(output: Any, times: int) -> Callable:
    """A forward that returns a fresh copy of what was remembered; of a tuple only the first is used.

    Rows and tokens stand apart or flat as in the input: a linear is called either way.
    """

    def answer(*args: Tensor, **kwargs: Any) -> Any:
        if not isinstance(output, Tensor):
            return tile(output[0], times), *[None] * (len(output) - 1)
        copy = tile(output, times)
        return copy.reshape(*args[0].shape[:-1], -1) if args else copy

    return answer
