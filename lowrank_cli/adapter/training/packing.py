"""Examples packed into one batch row, without padding; each attends to itself only.

Positions restart with each example. From them transformers makes a block-diagonal causal mask (N, N) of the row's N
tokens, or the lengths for FlashAttention. With torch's fused attention this file computes the blocks on the
diagonal one by one, which takes the sum of the squared lengths instead of N².
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowrank_cli.errors import UserError

KEY = "train.packing"
BOUNDS = "cu_seq_lens_q"  #: keyword of a packed pass: where examples begin and end, (examples + 1,)
#: Largest difference of logits to those of an example alone, relative to the largest logit. Examples that mix change
#: the first tokens by as much as the logits themselves.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def packed_inputs(lengths: list[int]) -> dict[str, Any]:
    """Keywords of a forward pass over a row of examples of ``lengths``, besides its tokens; no attention mask."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),  # (1, N)
        BOUNDS: bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def pack(model: PreTrainedModel) -> None:
    """Prepare ``model`` for passes with :func:`packed_inputs`; other passes stay the same.

    Call it under the autocast of training: FlashAttention cannot read fp32.

    Raises:
        UserError: examples of one row would influence each other.
    """
    require_packable(model)
    _attend_by_blocks()
    _require_apart(model)


@cache
def _attend_by_blocks() -> None:
    """Let the scaled dot-product attention of all models in this process go through :func:`attend`.

    It keeps its name, because some models compare that name to decide which masks they make.
    """
    AttentionInterface.register("sdpa", partial(attend, ALL_ATTENTION_FUNCTIONS["sdpa"]))


def require_packable(model: PreTrainedModel) -> None:
    """Raise UserError unless the attention of ``model``, which may be on the meta device, can be replaced."""
    if not model._supports_attention_backend:
        raise UserError(
            f"{KEY}: the attention of this '{model.config.model_type}' does not keep packed examples apart; "
            f"set it to false"
        )


def attend(
    attention: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``attention``; of a packed row, block by block on the diagonal: (1, H, N, D) -> (1, N, H, D)."""
    if kwargs.get(BOUNDS) is None:
        return attention(module, query, key, value, attention_mask, **kwargs)
    blocks = []
    for start, end in pairwise(kwargs[BOUNDS].tolist()):
        q, k, v = (states[:, :, start:end] for states in (query, key, value))  # (1, H, N, D) -> (1, H, T, D)
        mask = None if attention_mask is None else attention_mask[:, :, start:end, start:end]  # None: causal
        blocks.append(attention(module, q, k, v, mask, **kwargs)[0])  # (1, T, H, D)
    return torch.cat(blocks, dim=1), None  # (1, N, H, D)


@torch.no_grad()
def _require_apart(model: PreTrainedModel) -> None:
    """Raise UserError unless an example after another in one row has the logits that it has alone."""
    training, first, second = model.training, torch.arange(3, 11), torch.arange(11, 27)
    model.eval()

    def logits(*rows: Tensor) -> Tensor:
        inputs = {"input_ids": torch.cat(rows).unsqueeze(0), **packed_inputs([len(row) for row in rows])}  # (1, N)
        output = model(**on_device(inputs, model.device), use_cache=False).logits
        return output[0, -len(second) :].float()  # (1, N, V) -> (T, V)

    alone, after = logits(second), logits(first, second)
    model.train(training)
    device, dtype = model.device.type, cast(torch.dtype, model.get_input_embeddings().weight.dtype)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if (after - alone).abs().max() > TOLERANCES[dtype] * alone.abs().max():
        raise UserError(
            f"{KEY}: this '{model.config.model_type}' mixes packed examples (by convolutions, states or positions); "
            f"set it to false"
        )


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
