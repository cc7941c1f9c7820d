"""Axes and marks as SVG elements. Colours come from classes in report.css; text is escaped when it is serialized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from xml.etree import ElementTree as ET

from lowrank_cli.errors import escaped

WIDTH, HEIGHT = 440, 250  #: px of a chart; small enough to stay legible on a phone
LETTER = 6.2  #: px, mean width of a letter of an 11 px label
NOT_DRAWABLE = (ArithmeticError, LookupError, TypeError, ValueError)  #: raised by numbers that no chart can show
COLOURS = 8  #: series colours s0 … s7 of report.css


@dataclass
class Chart:
    """A figure of the page: one drawing, or small multiples with titles of their own."""

    title: str
    drawings: list[tuple[str, str]]  #: title and SVG
    legend: Sequence[tuple[str, str]] = ()  #: name and class
    note: str = ""
    wide: bool = False


@dataclass
class Axis:
    """The range of one axis, in data units. With ``log`` both ends are above 0."""

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False  #: whether values are whole numbers, so that ticks are too
    marks: Sequence[float] | None = None  #: where ticks are, instead of round numbers
    show: Callable[[float], str] | None = None  #: text of a tick

    @classmethod
    def over(cls, label: str, values: Iterable[float | None], *, pad: float = 0.0, log: bool = False) -> Axis:
        """An axis that spans the finite ``values``, and ``pad`` of their range more at both ends.

        It is linear where not all of them are above 0, and spans 1 around a single value.
        """
        known = finite(values) or [0.0, 1.0]
        whole = all(float(value).is_integer() for value in known)
        low, high = min(known), max(known)
        log = log and low > 0
        if log:
            factor = (high / low) ** pad if high > low else 2.0
            return cls(label, low / factor, high * factor, log=True, whole=whole)
        margin = pad * (high - low) if high > low else max(abs(high) * 0.1, 0.5 if float(high).is_integer() else 1e-9)
        return cls(label, low - margin, high + margin, whole=whole)

    def share(self, value: float) -> float:
        """Where ``value`` is between ``low`` (0) and ``high`` (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Positions and texts of at most about ``count`` ticks; fewer where two would have one text."""
        round_positions = self._decades if self.log else self._round
        positions = list(self.marks) if self.marks is not None else round_positions(count)
        show = self.show or ((lambda value: f"{value:.3g}") if self.log else plain(positions))
        ticks = [(position, show(position)) for position in positions]
        repeats = len({text for _, text in ticks}) < len(ticks)
        return self.ticks(count - 1) if repeats and self.marks is None and count > 1 else ticks

    def _round(self, count: int) -> list[float]:
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
        step = max(step, 1.0) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [step * k for k in range(first, first + count + 2) if step * k <= self.high + 1e-9 * step]

    def _decades(self, count: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            positions = [factor * 10.0**power for power in powers for factor in factors]
            positions = [
                position for position in positions if self.low <= position * 1.0001 and position <= self.high * 1.0001
            ]
            if len(positions) > 2:
                break
        return positions[:: math.ceil(len(positions) / 8)] if len(positions) > 1 else self._round(count)


def finite(values: Iterable[float | None]) -> list[float]:
    """Those of ``values`` that can be drawn."""
    return [value for value in values if value is not None and math.isfinite(value)]


def plain(positions: Sequence[float]) -> Callable[[float], str]:
    """How to write numbers like ``positions``: with as many decimals as tell them apart."""
    gaps = [abs(b - a) for a, b in pairwise(positions) if a != b]
    largest = max(map(abs, positions), default=0.0)
    if not gaps or largest >= 1e5 or 0 < largest < 1e-3 or largest > 1e4 * min(gaps):
        return lambda value: f"{value:.3g}"
    decimals = next((d for d in range(6) if all(abs(round(p, d) - p) < 1e-3 * min(gaps) for p in positions)), 6)
    return lambda value: f"{value:.{decimals}f}"


def number(value: float) -> str:
    """A pixel coordinate."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def add(parent: ET.Element, tag: str, text: str | None = None, /, **attributes: str | float) -> ET.Element:
    """A child element. ``class_`` is ``class``, other underscores are hyphens; numbers are pixels."""
    child = ET.SubElement(parent, tag)
    for key, value in attributes.items():
        child.set(key.rstrip("_").replace("_", "-"), escaped(value) if isinstance(value, str) else number(float(value)))
    child.text = None if text is None else escaped(text)
    return child


def canvas(label: str, width: float, height: float) -> ET.Element:
    """An empty drawing, which assistive technology reads as ``label``."""
    size = {"width": number(width), "height": number(height), "viewBox": f"0 0 {number(width)} {number(height)}"}
    return ET.Element("svg", {"class": "chart", "role": "img", "aria-label": escaped(label), "tabindex": "0", **size})


def text_of(drawing: ET.Element) -> str:
    """The drawing as HTML."""
    return ET.tostring(drawing, encoding="unicode")


def series(index: int, count: int) -> str:
    """Class of series ``index`` of ``count``: a colour of its own, or a shade where there are more than colours."""
    return f"s{index}" if count <= COLOURS else f"ramp{round(9 * index / (count - 1))}"


class Plot:
    """A drawing with a horizontal and a vertical axis; draws its grid, ticks and labels."""

    def __init__(self, label: str, x: Axis, y: Axis, width: float = WIDTH, height: float = HEIGHT):
        self.x, self.y = x, y
        self.drawing = canvas(label, width, height)
        ticks = y.ticks(max(2, round(height / 50)))
        self.left = 8 + LETTER * max((len(text) for _, text in ticks), default=0)
        self.right, self.top, self.bottom = width - 14, 22.0, height - 38
        add(self.drawing, "text", y.label, x=0, y=10, class_="label")
        add(self.drawing, "text", x.label, x=(self.left + self.right) / 2, y=height - 4, class_="label middle")
        for value, text in ticks:
            at = self.down(value)
            add(self.drawing, "line", x1=self.left, x2=self.right, y1=at, y2=at, class_="grid")
            add(self.drawing, "text", text, x=self.left - 6, y=at + 4, class_="end")
        last = -math.inf
        for value, text in x.ticks(6):
            half = LETTER * len(text) / 2
            if self.across(value) - half > last + 6:
                last = self.across(value) + half
                add(self.drawing, "text", text, x=self.across(value), y=self.bottom + 16, class_="middle")
        add(self.drawing, "line", x1=self.left, x2=self.right, y1=self.bottom, y2=self.bottom, class_="axis")

    def across(self, value: float) -> float:
        return self.left + self.x.share(value) * (self.right - self.left)

    def down(self, value: float) -> float:
        return self.bottom - self.y.share(value) * (self.bottom - self.top)

    def line(self, xs: Sequence[float], ys: Sequence[float | None], colour: str, *, kind: str = "line") -> None:
        """A line through the points, broken where a value is missing."""
        pairs = [(x, y if y is not None and math.isfinite(y) else None) for x, y in zip(xs, ys, strict=True)]
        path = ""
        for known, group in groupby(pairs, key=lambda pair: pair[1] is not None):
            if known:
                steps = [f"{number(self.across(x))} {number(self.down(y))}" for x, y in group if y is not None]
                path += "M" + "L".join(steps)
        add(self.drawing, "path", d=path, class_=f"{kind} {colour}")

    def band(
        self, xs: Sequence[float], lows: Sequence[float | None], highs: Sequence[float | None], colour: str
    ) -> None:
        """The area between ``lows`` and ``highs``, where both are known."""
        known = [(x, low, high) for x, low, high in zip(xs, lows, highs) if low is not None and high is not None]
        edge = [(x, low) for x, low, _ in known] + [(x, high) for x, _, high in reversed(known)]
        points = " ".join(f"{number(self.across(x))},{number(self.down(y))}" for x, y in edge)
        add(self.drawing, "polygon", points=points, class_=f"band {colour}")

    def dot(self, x: float, y: float, colour: str, tip: str, *, radius: float = 3, kind: str = "dot") -> None:
        """A mark whose ``tip`` the page shows on hover."""
        position = {"cx": self.across(x), "cy": self.down(y)}
        add(self.drawing, "circle", **position, r=radius, class_=f"{kind} {colour}", data_tip=tip)

    def svg(self) -> str:
        return text_of(self.drawing)
