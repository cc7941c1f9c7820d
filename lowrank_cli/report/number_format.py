"""How numbers are shown: counts, bytes, times and metrics; and the unit and the scale of many at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

ROUNDING = 1e-12  #: differences of metrics below it come from the order of their sums
FAR = 30  #: times the median above which the largest leaves the rest one colour, and digits that are all zeros


def count(value: float) -> str:
    """A number of things with three digits: ``262144`` → ``262k``, ``3600000`` → ``3.6M``."""
    return "".join(_scaled(value, 1000, ("", "k", "M", "B", "T")))


def size(value: float) -> str:
    """Bytes with three digits: ``641728512`` → ``612 MiB``."""
    return " ".join(_scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB")))


def _scaled(value: float, base: int, units: Sequence[str]) -> tuple[str, str]:
    unit = 0
    while abs(round(value)) >= base and unit + 1 < len(units):
        value, unit = value / base, unit + 1
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}", units[unit]


def duration(seconds: float) -> str:
    """Time in the two largest units: ``0.42s``, ``12.3s``, ``1m 52s``, ``2h 05m``, ``3d 04h``."""
    if seconds < 59.95:
        return f"{seconds:.2f}s" if seconds < 9.995 else f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours}h {minutes:02d}m"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days}d {hours:02d}h"


def jobs_of(number_of_jobs: int) -> str:
    """``1 job``, ``2 jobs``."""
    return f"{number_of_jobs} job{'s' * (number_of_jobs != 1)}"


def number(value: Any) -> str:
    """A metric's value: four decimals below 10, two above, three digits where it is tiny."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def signed(value: float) -> str:
    """A difference with its sign; what is left by the rounding of sums is zero."""
    return number(0.0) if abs(value) < ROUNDING else f"{'+' if value > 0 else ''}{number(value)}"


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
