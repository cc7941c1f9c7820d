"""Layers compiled with ``torch.compile`` for training passes."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.target_sites import layers, structure_of
from lowrank_cli.errors import UserError

KEY = "hardware.compile"

#: Limit on the graphs of a layer's code. Equal layers share one; the first layer, whose input has no gradient, needs
#: another, and so does every combination of ranks. Beyond the limit layers run uncompiled.
GRAPHS = 256


def require_compiler(device: str) -> None:
    """Raise UserError if the compiler for ``device`` is missing."""
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError(f"{KEY}: true needs the package triton on a GPU; install it, or set {KEY}=false")
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise UserError(f"{KEY}: true needs a C++ compiler on a CPU (g++, clang++ or $CXX); there is none")


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile the layers of the adapted ``model`` for training passes; outputs and gradients stay the same.

    Equal layers and all batch shapes share code. Compilation happens in the first step (a minute or more on a CPU).
    Other passes, and hooks of layers such as routers, run uncompiled. Dropout draws different numbers.

    Raises:
        UserError: the layers of the model are not known.
    """
    if structure_of(model) is None:
        raise UserError(f"{KEY}: the layers of this '{model.config.model_type}' are not known; set it to false")
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = max(GRAPHS, torch._dynamo.config.accumulated_recompile_limit)
    for layer in layers(model):
        layer.forward = partial(
            _in_training, layer, layer.forward, torch.compile(layer.forward, backend=backend, dynamic=True)
        )


def _in_training(layer: nn.Module, plain: Callable, compiled: Callable, *args: Any, **kwargs: Any) -> Any:
    return (compiled if layer.training and torch.is_grad_enabled() else plain)(*args, **kwargs)
