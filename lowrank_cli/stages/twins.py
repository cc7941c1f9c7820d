"""Several adapted models over one set of frozen weights, so that they can be measured in turn."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from transformers import PreTrainedModel

from lowrank_cli import methods
from lowrank_cli.adapter.core import Adapter, fingerprint
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Adapts, Method
from lowrank_cli.schema import MethodConfig

NOISE = 0.02  #: standard deviation of what is added to every trained tensor: no update is zero, as after training


@dataclass
class Twin:
    """The base model, or a copy of its modules (not of its weights) with an adapter."""

    model: PreTrainedModel
    method: Method | None = None
    adapter: Adapter | None = None

    @property
    def own_bytes(self) -> int:
        """Memory of the adapter's tensors: what this twin does not share with the others."""
        trained = self.adapter.trained.values() if self.adapter else ()
        return sum(parameter.numel() * parameter.element_size() for parameter in trained)


def twins(base: PreTrainedModel, variants: Mapping[str, MethodConfig | None], seed: int) -> dict[str, Twin]:
    """``base`` itself for None, and for each method a twin of it, adapted and perturbed with ``seed``.

    Raises UserError for a method that would change the weights they share.
    """
    base.requires_grad_(False)
    return {
        name: Twin(base) if config is None else _twin(base, name, config, seed) for name, config in variants.items()
    }


def copied(base: PreTrainedModel) -> PreTrainedModel:
    """The same weights under modules of their own."""
    shared = {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())}
    return copy.deepcopy(base, shared)  # deepcopy takes what its memo holds for copied already


def _twin(base: PreTrainedModel, name: str, config: MethodConfig, seed: int) -> Twin:
    shared = {id(tensor) for tensor in base.parameters()}
    before = fingerprint(base)
    model = copied(base)
    method = methods.create(config)
    assert isinstance(method, Adapts)
    torch.manual_seed(seed)
    adapter = method.adapt(model)
    if any(id(parameter) in shared for parameter in adapter.trained.values()) or fingerprint(base) != before:
        raise UserError(f"bench.methods: '{name}' changes the weights of the model, which all methods share here")
    with torch.no_grad():
        for parameter in adapter.trained.values():
            parameter.add_(torch.randn_like(parameter) * NOISE)
    model.eval()
    return Twin(model, method, adapter)
