"""Frozen weights in 4 bits, as bitsandbytes stores them: packed bytes (N, 1), and beside them how to read these.

Their linears compute y = W x + bias like any other, so an update that only reads and adds to outputs needs nothing from
here. What reads W itself (norms of rows, a decomposition) gets it from :func:`dense`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def quant_state(weight: Tensor) -> Any:
    """The library's object that says how to read ``weight``; None where that is not quantised."""
    return getattr(weight, "quant_state", None)


def quantized(weight: Tensor) -> bool:
    """Whether ``weight`` is stored in 4 bits."""
    return quant_state(weight) is not None


def dense(weight: Tensor) -> Tensor:
    """``weight`` itself; of one in 4 bits a new (O, I), the values that its linear computes with, in their dtype."""
    state = quant_state(weight)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(weight.data, state)  # (N, 1) -> (O, I)
    return values
