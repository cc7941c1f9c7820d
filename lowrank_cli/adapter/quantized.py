"""Frozen weights in 4 bits, as bitsandbytes stores them: packed bytes (N, 1) with a quantisation state.

Their linears compute y = W x + bias like any other, so updates that only add to outputs need nothing from here. Code
that reads W itself (norms of rows, a decomposition) calls :func:`dense`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def quant_state(weight: Tensor) -> Any:
    """bitsandbytes' quantisation state of ``weight``; None if it is not quantised."""
    return getattr(weight, "quant_state", None)


def quantized(weight: Tensor) -> bool:
    """Whether ``weight`` is stored in 4 bits."""
    return quant_state(weight) is not None


def dense(weight: Tensor) -> Tensor:
    """``weight`` itself, or, if it is in 4 bits, its dequantised values as a new tensor (O, I)."""
    state = quant_state(weight)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(weight.data, state)  # (N, 1) -> (O, I)
    return values
