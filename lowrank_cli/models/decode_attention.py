"""Attention of one new token in each row by our own kernel, as an attention function of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowrank_cli.native.kernels import LANES, kernels

MARK = "decodes_with_kernel"  #: attribute of modules


def use_decode_attention(model: PreTrainedModel) -> None:
    """Let ``model``, which the kernels suit, use them in decoding steps instead of torch's attention.

    It keeps the name ``sdpa`` in its config: some models compare that name to decide which masks they make. All models
    of the process then go through :func:`attention`, which is torch's attention for those that are not marked.
    """
    _attend_by_kernel()
    for module in model.modules():
        setattr(module, MARK, True)


@cache
def _attend_by_kernel() -> None:
    AttentionInterface.register("sdpa", partial(attention, ALL_ATTENTION_FUNCTIONS["sdpa"]))


def attention(
    otherwise: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The output (B, T, H, D) for queries (B, H, T, D): by the kernel for T = 1, in fp32, without gradients.

    Args:
        otherwise: the attention function that computes everything else.
    """
    plain = not dropout and position_bias is None and options.get("softcap") is None
    if plain and getattr(module, MARK, False) and _fits(query, key, value, attention_mask):
        compiled = kernels()
        assert compiled is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return compiled.attend(query, key, value, attention_mask, scale), None
    options |= {"dropout": dropout, "scaling": scaling, "position_bias": position_bias}
    return otherwise(module, query, key, value, attention_mask, **options)


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether these are inputs of :meth:`~lowrank_cli.native.kernels.Kernels.attend`."""
    (rows, _, tokens, width), seen = query.shape, key.shape[2]
    return (
        tokens == 1
        and not torch.is_grad_enabled()
        and query.dtype == key.dtype == value.dtype == torch.float32
        and width % LANES == 0
        and len(key) == rows
        and key.shape == value.shape
        and key.stride() == value.stride()
        and key.stride()[2:] == (width, 1)
        and (mask is None or (mask.dtype == torch.bool and mask.shape in ((rows, 1, 1, seen), (1, 1, 1, seen))))
        and (mask is None or mask.stride(3) == 1)
    )
