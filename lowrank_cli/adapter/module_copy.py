"""A copy of a model's modules over the same weights."""

from __future__ import annotations

import copy
from itertools import chain

from transformers import PreTrainedModel

from lowrank_cli.adapter.quantized import quant_state


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with modules of its own, which can be adapted alone; its weights and buffers are those of ``model``."""
    states = filter(None, map(quant_state, model.parameters()))
    shared = {id(one): one for one in chain(model.parameters(), model.buffers(), states)}
    return copy.deepcopy(model, shared)  # deepcopy takes what its memo holds for copied already
