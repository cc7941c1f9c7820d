"""How numbers are shown that may be of any size: their unit, and whether they need a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

FAR = 30  #: times the median above which the largest leaves the rest one colour, and digits that are all zeros


def unit(values: Iterable[float]) -> float:
    """The power of a thousand in which the largest value has one to three digits."""
    largest = max(map(abs, values), default=0.0)
    return 1000.0 ** math.floor(math.log10(largest) / 3) if largest else 1.0


def in_unit(unit: float) -> str:
    """What a label says of it."""
    return "" if unit == 1 else f", in units of {unit:g}"


def spans_decades(values: Sequence[float]) -> bool:
    """Whether none is negative and the largest is far above the median of those above zero."""
    positive = [value for value in values if value > 0]
    return len(positive) > 1 and min(values) >= 0 and max(positive) > FAR * median(positive)
