"""Forward passes that compute only answer positions after the last attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.lm_head import replaced_forwards
from lowrank_cli.adapter.target_sites import layers, layers_path, structure_of


@contextmanager
def answers_only(model: PreTrainedModel, answered: Tensor) -> Iterator[None]:
    """Inside, the last layer's feed-forward computes only the positions ``answered`` (B, T).

    The layer returns zeros elsewhere, which a classifier's head must not read. Models that are not known to mix
    positions in attention only compute everything.
    """
    structure = structure_of(model)
    if not (structure and structure.position_wise):
        yield
        return
    last, attention = layers(model)[-1], attention_of(model, len(layers(model)) - 1)
    with replaced_forwards({last: _narrowed(last, attention, answered)}):
        yield


def _narrowed(layer: nn.Module, attention: nn.Module, answered: Tensor) -> Callable:
    """The layer's forward in two passes: up to the end of attention, then with its output at ``answered`` only."""
    original = layer.forward

    def forward(*args: Tensor, **kwargs: Any) -> Any:
        outputs: list[Any] = []

        def stop(module: nn.Module, inputs: tuple, output: Any) -> None:
            outputs.append(output)
            raise StopForward

        hook = attention.register_forward_hook(stop)
        try:
            original(*args, **kwargs)
        except StopForward:
            pass
        finally:
            hook.remove()
        hidden = args[0] if args else kwargs.pop("hidden_states")
        mixed = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]  # (B, T, D)
        picked = mixed[answered].unsqueeze(1)  # (B, T, D) -> (N, 1, D)
        given = picked if isinstance(outputs[0], Tensor) else (picked, *[None] * (len(outputs[0]) - 1))
        with replaced_forwards({attention: lambda *args, **kwargs: given}):
            result = original(hidden[answered].unsqueeze(1), *args[1:], **kwargs)
        states = result if isinstance(result, Tensor) else result[0]  # (N, 1, D)
        full = torch.zeros_like(hidden)
        full[answered] = states.squeeze(1).to(full.dtype)  # (N, D) -> (B, T, D)
        return full if isinstance(result, Tensor) else (full, *result[1:])

    return forward


class StopForward(Exception):
    """Raised to end a forward pass early."""


def role_paths(model: PreTrainedModel, index: int) -> dict[str, str]:
    """Dotted paths of a layer's linears, by role."""
    structure = structure_of(model)
    assert structure is not None
    return {role: f"{structure.layers}.{index}.{linear.path}" for role, linear in structure.roles[index].items()}


def attention_of(model: PreTrainedModel, index: int) -> nn.Module:
    """The attention module of a layer, with its output projection."""
    root = f"{layers_path(model)}.{index}."
    return model.get_submodule(root + role_paths(model, index)["O"].removeprefix(root).split(".")[0])
