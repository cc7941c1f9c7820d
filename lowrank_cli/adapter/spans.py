"""Which output features of a packed linear belong to one role: a run of them, or a run of every group of heads.

Phi-3's ``qkv_proj`` holds all queries, then all keys, then all values. GPT-NeoX's ``query_key_value`` holds query, key
and value of one head after another, so each role has a run of features in every head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Features f with ``start <= f % period < stop``; without a ``period``, those from ``start`` to ``stop``."""

    start: int
    stop: int
    period: int | None = None


def width(span: Span, outputs: int) -> int:
    """How many of ``outputs`` features the span covers."""
    return (span.stop - span.start) * (outputs // span.period if span.period else 1)


def is_view(span: Span | None) -> bool:
    """Whether :func:`take` gives a view, so that writing into it writes into the whole."""
    return span is None or span.period is None


def index(span: Span | None, outputs: int, device: torch.device | None = None) -> slice | Tensor:
    """What selects the features of ``span`` (None: all) from an axis of ``outputs``."""
    if span is None or span.period is None:
        return slice(None) if span is None else slice(span.start, span.stop)
    return _features(span, outputs, device)


@lru_cache(maxsize=64)
def _features(span: Span, outputs: int, device: torch.device | None) -> Tensor:
    features = torch.arange(outputs, device=device)
    place = features % (span.period or outputs)
    return features[(place >= span.start) & (place < span.stop)]


def take(y: Tensor, span: Span | None) -> Tensor:
    """The features of ``span`` on the last axis of ``y`` (…, O) -> (…, W): a view where :func:`is_view`, or a copy."""
    return y if span is None else y[..., index(span, y.shape[-1], y.device)]


def put(y: Tensor, span: Span | None, value: Tensor) -> None:
    """Write ``value`` (…, W), which was changed in place since :func:`take`, back into ``y`` (…, O)."""
    if not is_view(span):
        y[..., index(span, y.shape[-1], y.device)] = value
