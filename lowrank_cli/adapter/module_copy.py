"""Copies of a model that share its weights."""

from __future__ import annotations

import copy
from itertools import chain

from transformers import PreTrainedModel

from lowrank_cli.adapter.quantized import quant_state


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` that can be adapted independently; weights and buffers are shared."""
    states = filter(None, map(quant_state, model.parameters()))
    memo = {id(shared): shared for shared in chain(model.parameters(), model.buffers(), states)}
    return copy.deepcopy(model, memo)  # deepcopy reuses what is in the memo
