"""Charts with a named line for each row and one horizontal axis: boxes, bars, discs, differences."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_cli.report.html.charts import svg
from lowrank_cli.report.html.charts.svg import Axis, add

WIDE = 920  #: px of a chart across the page
FOOT = 40  #: px below the rows, for ticks and the label of the axis


def width_for(names: Sequence[str]) -> float:
    """The width that leaves ``names`` at most two fifths of the drawing, if the page has it."""
    return svg.WIDTH if svg.LETTER * max(map(len, names), default=0) < 0.4 * svg.WIDTH else WIDE


class Rows:
    """The drawing; ``middles`` are the heights of the rows. Names that are too long are cut, and whole on hover."""

    def __init__(
        self, label: str, names: Sequence[str], axis: Axis, *, row: float, width: float = svg.WIDTH, inset: float = 0
    ):
        self.axis = axis
        left = min(12 + svg.LETTER * max(map(len, names), default=0), width * 0.45)
        self.left, self.right = left + inset, width - 14 - inset
        self.foot = 4 + row * len(names)
        self.middles = [4 + row * (index + 0.5) for index in range(len(names))]
        self.drawing = svg.canvas(label, width, self.foot + FOOT)
        for value, text in axis.ticks(5):
            self.vertical(value, "grid")
            add(self.drawing, "text", text, x=self.across(value), y=self.foot + 16, class_="middle")
        add(self.drawing, "text", axis.label, x=(left + width - 14) / 2, y=self.foot + 35, class_="label middle")
        longest = int((left - 8) / svg.LETTER)
        for name, middle in zip(names, self.middles, strict=True):
            short = name if len(name) <= longest else f"{name[: longest - 1]}…"
            add(self.drawing, "text", short, x=left - 8, y=middle + 4, class_="end name", data_tip=name)

    def across(self, value: float) -> float:
        return self.left + self.axis.share(value) * (self.right - self.left)

    def vertical(self, value: float, kind: str) -> None:
        """A line at ``value`` through all rows."""
        at = self.across(value)
        add(self.drawing, "line", x1=at, x2=at, y1=4, y2=self.foot, class_=kind)

    def span(self, low: float, high: float, at: float, kind: str) -> None:
        """A horizontal line at the height ``at``."""
        add(self.drawing, "line", x1=self.across(low), x2=self.across(high), y1=at, y2=at, class_=kind)

    def block(self, low: float, high: float, at: float, height: float, kind: str, tip: str) -> None:
        """A bar from ``low`` to ``high`` around the height ``at``."""
        width = max(self.across(high) - self.across(low), 1)
        position = {"x": self.across(low), "y": at - height / 2, "width": width, "height": height}
        add(self.drawing, "rect", **position, class_=kind, data_tip=tip)

    def disc(self, value: float, at: float, radius: float, kind: str, tip: str) -> None:
        add(self.drawing, "circle", cx=self.across(value), cy=at, r=radius, class_=kind, data_tip=tip)

    def diamond(self, value: float, at: float, kind: str, size: float = 5) -> None:
        x = self.across(value)
        corners = ((x - size, at), (x, at - size), (x + size, at), (x, at + size))
        points = " ".join(f"{svg.number(a)},{svg.number(b)}" for a, b in corners)
        add(self.drawing, "polygon", points=points, class_=kind)

    def svg(self) -> str:
        return svg.text_of(self.drawing)
