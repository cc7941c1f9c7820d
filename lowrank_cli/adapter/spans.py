"""Which output features of a packed linear belong to one role: a contiguous range, or one range for each head.

Phi-3's ``qkv_proj`` stores all queries, then all keys, then all values. GPT-NeoX's ``query_key_value`` stores query,
key and value head by head, so each role has a range of features in every head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Span(NamedTuple):
    """Features f with ``start <= f % period < stop``; with ``period`` None, ``start <= f < stop``."""

    start: int
    stop: int
    period: int | None = None


def width(span: Span, outputs: int) -> int:
    """The number of features that the span covers, out of ``outputs``."""
    return (span.stop - span.start) * (outputs // span.period if span.period else 1)


def is_view(span: Span | None) -> bool:
    """Whether :func:`take` returns a view, so that writes reach the original tensor."""
    return span is None or span.period is None


def index(span: Span | None, outputs: int, device: torch.device | None = None) -> slice | Tensor:
    """Index of the features of ``span`` (None: all) on an axis of length ``outputs``."""
    if span is None or span.period is None:
        return slice(None) if span is None else slice(span.start, span.stop)
    return _features(span, outputs, device)


@lru_cache(maxsize=64)
@_disable_current_modes()
def _features(span: Span, outputs: int, device: torch.device | None) -> Tensor:
    features = torch.arange(outputs, device=device)
    offset = features % (span.period or outputs)
    return features[(offset >= span.start) & (offset < span.stop)]


def take(y: Tensor, span: Span | None) -> Tensor:
    """The features of ``span`` on the last axis of ``y`` (…, O) -> (…, W): a view if :func:`is_view`, else a copy."""
    return y if span is None else y[..., index(span, y.shape[-1], y.device)]


def put(y: Tensor, span: Span | None, value: Tensor) -> None:
    """Write ``value`` (…, W), from :func:`take` and changed in place, back into ``y`` (…, O)."""
    if not is_view(span):
        y[..., index(span, y.shape[-1], y.device)] = value
