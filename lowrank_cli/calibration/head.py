"""The weight of the language model's head, for the closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.lm_head import output_layer
from lowrank_cli.adapter.spans import index


@torch.no_grad()
def head_weight(model: PreTrainedModel) -> Tensor:
    """The head's weight (V, D) in fp32, with an adapter's update of it."""
    head = output_layer(model)
    assert head is not None and isinstance(head.weight, Tensor)
    weight = head.weight.detach().float()
    if isinstance(head, AdaptedLinear):
        weight = weight.clone()
        for module, span in head.updates:
            weight[index(span, len(weight), weight.device)] += module.delta()
    return weight
