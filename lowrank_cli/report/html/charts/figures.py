"""The entries of ``figures.json`` as interactive charts; :func:`lowrank_cli.report.plots.draw` explains them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, quantiles
from typing import Any

from lowrank_cli.errors import UserError
from lowrank_cli.report.html.charts import svg
from lowrank_cli.report.html.charts.heatmaps import Colours, heatmap, heatmaps
from lowrank_cli.report.html.charts.rows import WIDE, Rows
from lowrank_cli.report.html.charts.svg import Axis, Chart, Plot, add, finite
from lowrank_cli.report.number_format import number

VISIBLE_POINTS = 60  #: a line with more points has no dots
FEW_COLUMNS = 8  #: up to here each has its tick


def chart(entry: dict[str, Any]) -> Chart:
    """The chart of one entry. Raises UserError where its rows, columns and values do not go together."""
    kinds = {"heatmap": heatmap, "heatmaps": heatmaps, "lines": lines, "box": box, "bubbles": bubbles, "bars": bars}
    try:
        return kinds[entry["kind"]](entry)
    except svg.NOT_DRAWABLE as error:
        raise UserError(f"figures.json: '{entry['file']}' cannot be drawn ({type(error).__name__}: {error})") from error


def lines(entry: dict[str, Any]) -> Chart:
    """Each row as a line over the numbers in ``columns``, with a band from ``low`` to ``high``."""
    rows, values = [str(row) for row in entry["rows"]], entry["values"]
    lows, highs = entry.get("low") or [], entry.get("high") or []
    x = _columns(entry)
    y = Axis.over(str(entry.get("label") or ""), [v for line in [*values, *lows, *highs] for v in line], pad=0.06)
    plot = Plot(entry["title"], x, y)
    columns = [float(column) for column in entry["columns"]]
    kind = "dot" if len(columns) <= VISIBLE_POINTS else "hit"
    for index, (name, line) in enumerate(zip(rows, values, strict=True)):
        colour = svg.series(index, len(rows))
        if lows:
            plot.band(columns, lows[index], highs[index], colour)
        plot.line(columns, line, colour)
        for at, (column, value) in enumerate(zip(columns, line, strict=True)):
            if value is not None and math.isfinite(value):
                around = f" ({number(lows[index][at])} to {number(highs[index][at])})" if lows else ""
                tip = f"{name}\n{x.label} {column:g}: {number(value)}{around}"
                plot.dot(column, value, colour, tip, kind=kind)
    return Chart(entry["title"], [("", plot.svg())], _legend(rows))


def _columns(entry: dict[str, Any]) -> Axis:
    """The axis of the numbers in ``columns``: logarithmic where they grow by a factor; few have a tick each."""
    columns = [float(column) for column in entry["columns"]]
    grows = len(columns) > 2 and columns[0] > 0 and columns[-1] / columns[0] >= 0.99 * 2 ** (len(columns) - 1)
    axis = Axis.over(str(entry.get("column_label") or ""), columns, log=grows)
    axis.marks = columns if len(columns) <= FEW_COLUMNS else None
    return axis


def _legend(names: Sequence[str]) -> list[tuple[str, str]]:
    """Nothing for a single series: the title says what it is."""
    return [(name, svg.series(index, len(names))) for index, name in enumerate(names)] if len(names) > 1 else []


def box(entry: dict[str, Any]) -> Chart:
    """For each row every value, the quartiles as a box, the mean as a diamond."""
    values = [finite(line) for line in entry["values"]]
    names = [f"{row} (n = {len(line)})" for row, line in zip(entry["rows"], values, strict=True)]
    axis = Axis.over(str(entry.get("label") or ""), [value for line in values for value in line], pad=0.05)
    plot = Rows(entry["title"], names, axis, row=34)
    for name, line, at in zip(names, values, plot.middles, strict=True):
        if not line:
            continue
        low, middle, high = quantiles(line, n=4, method="inclusive") if len(line) > 1 else line * 3
        tip = f"{name}\nquartiles {number(low)}, {number(middle)}, {number(high)}\nmean {number(fmean(line))}"
        plot.span(min(line), max(line), at, "axis")
        plot.block(low, high, at, 16, "box s0", tip)
        for index, value in enumerate(line):
            lift = ((index * 7) % 5 - 2) * 2.5  # equal values do not cover each other
            plot.disc(value, at + lift, 2.5, "dot faint s0", f"{name}\n{number(value)}")
        plot.block(middle, middle, at, 16, "median", tip)
        plot.diamond(fmean(line), at, "mean", 4)
    return Chart(entry["title"], [("", plot.svg())], note="Box: quartiles. Diamond: mean. Dots: every value.")


def bubbles(entry: dict[str, Any]) -> Chart:
    """Each value as the colour of a disc, its area in proportion to ``sizes``, row by row over ``columns``."""
    rows, columns = [str(row) for row in entry["rows"]], [float(column) for column in entry["columns"]]
    label, size_label = str(entry.get("label") or "value"), str(entry.get("size_label") or "size")
    colours = Colours(entry, finite(value for line in entry["values"] for value in line))
    largest = max(finite(size for line in entry["sizes"] for size in line), default=0) or 1
    wide = len(columns) > 12
    plot = Rows(entry["title"], rows, _columns(entry), row=15, width=WIDE if wide else svg.WIDTH, inset=10)
    for name, at, line, sizes in zip(rows, plot.middles, entry["values"], entry["sizes"], strict=True):
        for column, value, size in zip(columns, line, sizes, strict=True):
            if value is not None and size is not None and math.isfinite(value):
                tip = f"{name}, {column:g}\n{label}: {number(value)}\n{size_label}: {size:g}"
                position = {"cx": plot.across(column), "cy": at, "r": 7 * math.sqrt(max(size, 0) / largest)}
                add(plot.drawing, "circle", **position, **colours.fill(value, "cell ring"), data_tip=tip)
    note = f"Area: {size_label}, at most {largest:g}."
    return Chart(entry["title"], [("", plot.svg()), ("", colours.key(label))], note=note, wide=wide)


def bars(entry: dict[str, Any]) -> Chart:
    """A bar for each row and column, from 0, with its interval and a line at 1."""
    rows, columns = [str(row) for row in entry["rows"]], [str(column) for column in entry["columns"]]
    values, lows, highs = entry["values"], entry["low"], entry["high"]
    top = max(finite(value for line in [*values, *highs] for value in line), default=1.0)
    plot = Rows(
        entry["title"], rows, Axis(str(entry.get("label") or ""), 0, max(1.15 * top, 1e-9)), row=14 * len(columns) + 14
    )
    for row, (name, middle) in enumerate(zip(rows, plot.middles, strict=True)):
        for index, column in enumerate(columns):
            value, low, high = values[row][index], lows[row][index], highs[row][index]
            if value is None or not math.isfinite(value):
                continue
            at = middle + (index - (len(columns) - 1) / 2) * 14
            known = low is not None and high is not None
            tip = f"{name}, {column}\n{number(value)}" + (f" ({number(low)} to {number(high)})" if known else "")
            plot.block(0, max(value, 0), at, 10, f"bar {svg.series(index, len(columns))}", tip)
            if known:
                plot.span(low, high, at, "whisker")
            end = plot.across(max(value, high if known else value)) + 5
            add(plot.drawing, "text", f"{value:.2f}", x=end, y=at + 4, class_="name")
    if top >= 1:
        plot.vertical(1, "reference")
    return Chart(entry["title"], [("", plot.svg())], _legend(columns))
