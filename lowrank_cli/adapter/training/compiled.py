"""Training passes through ``torch.compile``: the layers as generated code instead of one kernel for each operation."""

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

#: Graphs of one layer: one for layers alike, one for the first, whose input has no gradient, and, where a method gives
#: modules different ranks, one for each layer anew. Beyond this many a layer runs as it stands.
GRAPHS = 256


def require_compiler(device: str) -> None:
    """Raises UserError where what turns graphs into code for ``device`` is missing."""
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError(f"{KEY}: true needs the package triton on a GPU; install it, or set {KEY}=false")
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise UserError(f"{KEY}: true needs a C++ compiler on a CPU (g++, clang++ or $CXX); there is none")


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """From now on, training passes of the adapted ``model`` run each layer compiled; equal outputs and gradients.

    Layers that are alike share their code, and batches of all shapes do. The first step waits for it (a minute or more
    on a CPU). Other passes, and the hooks of a layer, its router among them, run as they stand. Dropout draws other
    numbers than without. Raises UserError for a model whose layers are not known.
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
