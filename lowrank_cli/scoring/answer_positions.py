"""A forward pass that computes, behind the last attention, only the positions that an answer is read from."""

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
    """Inside, the last layer's feed-forward sees the positions ``answered`` (B, T) alone.

    What the layer returns elsewhere is zero, so a classifier's head must not read it. The last layer of a model that is
    not known to keep positions apart outside attention sees everything.
    """
    structure = structure_of(model)
    if not (structure and structure.position_wise):
        yield
        return
    last, attention = layers(model)[-1], attention_of(model, len(layers(model)) - 1)
    with replaced_forwards({last: _narrowed(last, attention, answered)}):
        yield


def _narrowed(layer: nn.Module, attention: nn.Module, answered: Tensor) -> Callable:
    """The layer's forward in two passes: until attention is done, and with what it gave at ``answered``."""
    original = layer.forward

    def forward(*args: Tensor, **kwargs: Any) -> Any:
        found: list[Any] = []

        def stop(module: nn.Module, inputs: tuple, output: Any) -> None:
            found.append(output)
            raise Done

        hook = attention.register_forward_hook(stop)
        try:
            original(*args, **kwargs)
        except Done:
            pass
        finally:
            hook.remove()
        hidden = args[0] if args else kwargs.pop("hidden_states")
        mixed = found[0] if isinstance(found[0], Tensor) else found[0][0]  # (B, T, D)
        picked = mixed[answered].unsqueeze(1)  # (B, T, D) -> (N, 1, D)
        given = picked if isinstance(found[0], Tensor) else (picked, *[None] * (len(found[0]) - 1))
        with replaced_forwards({attention: lambda *args, **kwargs: given}):
            output = original(hidden[answered].unsqueeze(1), *args[1:], **kwargs)
        result = output if isinstance(output, Tensor) else output[0]  # (N, 1, D)
        full = torch.zeros_like(hidden)
        full[answered] = result.squeeze(1).to(full.dtype)  # (N, D) -> (B, T, D)
        return full if isinstance(output, Tensor) else (full, *output[1:])

    return forward


class Done(Exception):
    """Raised inside a forward pass of which nothing more is wanted."""


def role_paths(model: PreTrainedModel, index: int) -> dict[str, str]:
    """Dotted path of the linear of each role in a layer."""
    structure = structure_of(model)
    assert structure is not None
    return {role: f"{structure.layers}.{index}.{linear.path}" for role, linear in structure.roles[index].items()}


def attention_of(model: PreTrainedModel, index: int) -> nn.Module:
    """The module of a layer that holds its attention, output projection included."""
    root = f"{layers_path(model)}.{index}."
    return model.get_submodule(root + role_paths(model, index)["O"].removeprefix(root).split(".")[0])
