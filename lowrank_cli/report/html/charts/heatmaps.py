"""Grids of coloured cells. A cell's opacity is its value, so one hue reads in light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lowrank_cli.report import number_format
from lowrank_cli.report.html.charts import svg
from lowrank_cli.report.html.charts.svg import Chart, add, finite
from lowrank_cli.report.number_format import number

WHOLE = ".0f"
WRITTEN_CELLS = 300  #: a heatmap with more cells shows colours only

Grid = list[list[float | None]]


class Colours:
    """How strongly a cell is coloured: 0 at the low end of the values, 1 at the high end, and the sign of a value."""

    def __init__(self, entry: dict[str, Any], values: Sequence[float]):
        known = values or [0.0]
        self.log = False
        if "scale" in entry:
            self.low, self.high = entry["scale"]
        elif min(known) < 0:
            self.high = max(map(abs, known))
            self.low = -self.high
        elif number_format.spans_decades(known):
            self.low, self.high, self.log = min(value for value in known if value > 0), max(known), True
        else:
            self.low, self.high = 0.0, max(known) or 1.0

    def strength(self, value: float) -> float:
        if self.log:
            return min(max(math.log(value / self.low) / math.log(self.high / self.low), 0), 1) if value > 0 else 0.0
        if self.low < 0:
            return min(abs(value) / self.high, 1)
        return min(max((value - self.low) / (self.high - self.low), 0), 1)

    def fill(self, value: float, kind: str = "cell") -> dict[str, str]:
        """Class and opacity of a mark of that ``value``."""
        return {"class_": f"{kind} below" if value < 0 else kind, "fill_opacity": f"{self.strength(value):.2f}"}

    def key(self, label: str) -> str:
        """The colours of five values between the ends, with ``label`` above."""
        drawing = svg.canvas(f"{label}: {number(self.low)} to {number(self.high)}", 220, 34)
        drawing.attrib.pop("tabindex")
        drawing.set("class", "chart key")
        add(drawing, "text", label, x=0, y=10, class_="label")
        low, high = f"{self.low:.3g}", f"{self.high:.3g}"
        left = svg.LETTER * len(low) + 6
        for step in range(5):
            share = step / 4
            value = (
                self.low * (self.high / self.low) ** share if self.log else self.low + share * (self.high - self.low)
            )
            add(drawing, "rect", x=left + 18 * step, y=17, width=18, height=11, **self.fill(value))
        add(drawing, "text", low, x=0, y=27)
        add(drawing, "text", high, x=left + 96, y=27)
        return svg.text_of(drawing)


def _drawn_grid(entry: dict[str, Any], grid: Grid, colours: Colours, digits: str, width: float, title: str) -> str:
    """One grid of cells, at most ``width`` px wide where that leaves each of them 5 px."""
    rows, columns = [str(row) for row in entry["rows"]], [str(column) for column in entry["columns"]]
    if len(grid) != len(rows) or any(len(line) != len(columns) for line in grid):
        raise ValueError(f"values are not {len(rows)} × {len(columns)}")
    left = 10 + svg.LETTER * max((len(row) for row in rows), default=0)
    widest = svg.LETTER * max((len(column) for column in columns), default=0) + 8
    cell = min(max((width - left) / max(len(columns), 1), 5), max(48, widest))
    high = 22 if len(rows) <= 16 else 13
    written = len(rows) * len(columns) <= WRITTEN_CELLS and cell >= 24
    drawing = svg.canvas(title, left + cell * len(columns) + 2, high * len(rows) + 36)
    names = entry.get("row_label") or "", entry.get("column_label") or ""
    for y, (name, line) in enumerate(zip(rows, grid)):
        add(drawing, "text", name, x=left - 6, y=high * (y + 0.5) + 4, class_="end")
        for x, value in enumerate(line):
            position = {"x": left + cell * x, "y": high * y, "width": cell - 1, "height": high - 1}
            where = f"{names[0]} {name}, {names[1]} {columns[x]}".replace(" ,", "").strip(" ,")
            if value is None or not math.isfinite(value):
                add(drawing, "rect", **position, class_="missing", data_tip=f"{where}\nno value")
                continue
            fill = colours.fill(value)
            add(
                drawing,
                "rect",
                **position,
                **fill,
                data_tip=f"{where}\n{format(value, digits) if digits == WHOLE else number(value)}",
            )
            if written:
                ink = "on middle" if float(fill["fill_opacity"]) > 0.5 else "value middle"
                text = format(value, digits)
                add(drawing, "text", text, x=position["x"] + cell / 2, y=position["y"] + high / 2 + 4, class_=ink)
    for y, line in enumerate(entry.get("outlined") or []):
        for x in (x for x, framed in enumerate(line) if framed):
            add(
                drawing, "rect", x=left + cell * x + 1, y=high * y + 1, width=cell - 3, height=high - 3, class_="framed"
            )
    step = math.ceil(widest / cell)
    for x in range(0, len(columns), step):
        add(drawing, "text", columns[x], x=left + cell * (x + 0.5), y=high * len(rows) + 14, class_="middle")
    add(drawing, "text", names[1], x=left + cell * len(columns) / 2, y=high * len(rows) + 31, class_="label middle")
    return svg.text_of(drawing)


def _digits(values: Sequence[float]) -> str:
    """Format of the values in cells: about three digits."""
    if all(float(value).is_integer() for value in values):
        return WHOLE
    largest = max(map(abs, values))
    if number_format.spans_decades(values):
        return ".2g"
    return ".0f" if largest >= 100 else ".1f" if largest >= 10 else ".2f"


def _in_units(entry: dict[str, Any], grids: list[Grid]) -> tuple[list[Grid], str]:
    """The grids, in a power of a thousand if ``entry`` asks for it, and what a value is."""
    label = str(entry.get("label") or "")
    if not entry.get("in_units"):
        return grids, label
    unit = number_format.unit(finite(value for grid in grids for line in grid for value in line))
    scaled = [[[None if value is None else value / unit for value in line] for line in grid] for grid in grids]
    return scaled, label + number_format.in_unit(unit)


def _grids(entry: dict[str, Any], titled: list[tuple[str, Grid]]) -> Chart:
    grids, label = _in_units(entry, [grid for _, grid in titled])
    known = finite(value for grid in grids for line in grid for value in line)
    colours, digits = Colours(entry, known), _digits(known or [0.0])
    wide = len(titled) > 1 or len(entry["columns"]) > 16
    width = {1: 920.0 if wide else 440.0, 2: 440.0}.get(len(titled), 290.0)
    drawings = [
        (title, _drawn_grid(entry, grid, colours, digits, width, f"{entry['title']} {title}".strip()))
        for (title, _), grid in zip(titled, grids)
    ]
    return Chart(entry["title"], [*drawings, ("", colours.key(label))], wide=wide)


def heatmap(entry: dict[str, Any]) -> Chart:
    """Rows × columns of coloured cells, the values written in while there are few."""
    return _grids(entry, [("", entry["values"])])


def heatmaps(entry: dict[str, Any]) -> Chart:
    """Small multiples in one scale of colours."""
    return _grids(entry, [(str(panel["title"]), panel["values"]) for panel in entry["panels"]])
