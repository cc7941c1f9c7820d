"""Plots of a comparison: swept numbers, Pareto fronts, and forest plots of differences. matplotlib is imported late."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_cli.errors import escaped
from lowrank_cli.report import plots
from lowrank_cli.report.comparison import Comparison, Row, Section, priced, swept

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Label of each cost that Pareto fronts are drawn over, and its unit.
COST_AXES = {
    "trainable": ("trainable parameters in thousands", 1e3),
    "seconds": ("training time in s", 1.0),
    "memory": ("peak memory in MiB", 2.0**20),
}
FRONT, OTHER = plots.TRAIN, plots.REFERENCE


def write(comparison: Comparison, folder: Path) -> None:
    """Write the plots that the comparison has data for, as PNG."""
    for section in comparison.sections:
        plots.write(seeds(section), folder / _name("seeds", section.model, section.task))
        if (entry := curve(section)) is not None:
            plots.write(plots.picture(entry), folder / entry["file"])
        if (figure := pareto(section)) is not None:
            plots.write(figure, folder / _name("pareto", section.model, section.task))
        tested = [(row.label, d.mean, d.low, d.high) for row in section.rows if (d := row.difference) is not None]
        if tested:
            figure = forest(f"{section.model} · {section.task}", _difference_label(section, comparison), tested)
            plots.write(figure, folder / _name("forest", section.model, section.task))
    for model in dict.fromkeys(result.model for result in comparison.across_tasks):
        results = [(r.method, r.mean, r.low, r.high) for r in comparison.across_tasks if r.model == model]
        figure = forest(f"{model} · all tasks together", f"difference from {comparison.baseline}", results)
        plots.write(figure, folder / _name("forest", model, "all"))


def _name(*parts: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", "-".join(parts)) + ".png"


def _difference_label(section: Section, comparison: Comparison) -> str:
    better = "left" if section.lower_is_better else "right"
    return f"{section.metric}, difference from {comparison.baseline} ({better} is better)"


@plots.styled
def forest(title: str, label: str, rows: Sequence[tuple[str, float, float | None, float | None]]) -> Figure:
    """Differences with their 95 % intervals around a line at 0; those whose interval excludes 0 are coloured.

    Args:
        label: of the horizontal axis.
        rows: name, difference, and the ends of its interval, from top to bottom.
    """
    figure, axes = plots._figure(7.2, 1.3 + 0.36 * len(rows))
    axes.axvline(0, color=plots.REFERENCE, linewidth=0.9, linestyle="--")
    for place, (_, mean, low, high) in enumerate(rows):
        excludes = low is not None and high is not None and not low <= 0 <= high
        colour = FRONT if excludes else OTHER
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot([mean], [place], color=colour, marker="o", markersize=5)
    axes.set_yticks(range(len(rows)), [_literal(name) for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    axes.set_xlabel(_literal(label))
    axes.set_title(_literal(title))
    return figure


@plots.styled
def seeds(section: Section) -> Figure:
    """Methods × seeds: every run as a point, one colour for each seed, and the median of each row as a line."""
    figure, axes = plots._figure(7.2, 1.5 + 0.4 * len(section.rows))
    every = sorted({seed for row in section.rows for seed in row.values})
    colours = plots.series_colours(len(every))
    for at, seed in enumerate(every):
        shift = 0.5 * ((at + 0.5) / len(every) - 0.5)  # the seeds of a row are one above the other
        shown = [(row.values[seed], place + shift) for place, row in enumerate(section.rows) if seed in row.values]
        axes.plot(*zip(*shown), linestyle="none", marker="o", markersize=5, color=colours[at], label=str(seed))
    for place, row in enumerate(section.rows):
        axes.vlines(row.median, place - 0.36, place + 0.36, color="#16191d", linewidth=1.6)
    axes.set_yticks(range(len(section.rows)), [_literal(row.label) for row in section.rows])
    axes.set_ylim(len(section.rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    axes.set_xlabel(_literal(f"{section.metric}; line: median"))
    axes.set_title(_literal(f"{section.model} · {section.task}"))
    if len(every) > 1:
        axes.legend(title="seed", loc="upper left", bbox_to_anchor=(1, 1), ncols=1 + len(every) // 12)
    return figure


@plots.styled
def pareto(section: Section) -> Figure | None:
    """Median over each cost that differs between rows, with intervals and the front; None without such a cost."""
    rows = priced(section)
    costs = [cost for cost in COST_AXES if len({getattr(row, cost) for row in rows} - {None}) > 1]
    if not costs:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 3.6 * len(costs), 3.8))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, costs, strict=True):
        _pareto_panel(axes, rows, cost)
    panels[0].set_ylabel(_literal(f"{section.metric}, median and interval"))
    figure.suptitle(_literal(f"{section.model} · {section.task}"), x=0.01, ha="left")
    return figure


def _pareto_panel(axes: Any, rows: Sequence[Row], cost: str) -> None:
    label, unit = COST_AXES[cost]
    points = [(row, getattr(row, cost) / unit) for row in rows if getattr(row, cost) is not None]
    values = [value for _, value in points]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_xscale("log")
    front = sorted((value, row.median) for row, value in points if cost in row.pareto)
    costs, medians = [value for value, _ in front], [middle for _, middle in front]
    axes.plot(costs, medians, color=FRONT, linewidth=1, alpha=0.6, drawstyle="steps-post")  # what a budget can reach
    for row, value in points:
        colour = FRONT if cost in row.pareto else OTHER
        axes.plot([value, value], [row.low, row.high], color=colour, linewidth=1.2, alpha=0.5)
        axes.plot([value], [row.median], color=colour, marker="D" if cost in row.pareto else "o", markersize=5)
    axes.margins(x=0.18)
    if axes.get_xscale() == "linear":
        axes.locator_params(axis="x", nbins=5)
    scaled = axes.xaxis.get_transform().transform
    middle = scaled(axes.get_xlim()).mean()
    for row, value in points:
        beyond = scaled([value])[0] > middle  # the label is on the side with room
        axes.annotate(
            _literal(row.label),
            (value, row.median),
            xytext=(-6 if beyond else 6, 3),
            textcoords="offset points",
            ha="right" if beyond else "left",
            fontsize=8,
            color=FRONT if cost in row.pareto else OTHER,
        )
    axes.set_xlabel(label)


def _literal(text: str) -> str:
    """``text`` as it is: no formulas, no control characters."""
    return escaped(text).replace("$", r"\$")


def curve(section: Section) -> dict[str, Any] | None:
    """The plot of a section in which one number was swept: medians and intervals over it, as ``lines``.

    A method without this number is a level line. None below three values.
    """
    key, numbers = swept(section.rows)
    columns = sorted(set(numbers.values()))
    if len(columns) < 3:
        return None
    by_method: dict[str, dict[float, Row]] = {}
    for row in section.rows:
        for column in [numbers[row.label]] if row.label in numbers else columns:
            by_method.setdefault(row.method, {})[column] = row
    seeds = sorted({len(row.values) for row in section.rows})
    counted = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    several = f"median and interval of {counted} seeds" if seeds[-1] > 1 else "1 seed"

    def grid(part: str) -> list[list[float | None]]:
        return [[getattr(line.get(column), part, None) for column in columns] for line in by_method.values()]

    return {
        "file": _name("compare", section.model, section.task),
        "kind": "lines",
        "title": f"{section.model} · {section.task}",
        "rows": list(by_method),
        "columns": columns,
        "values": grid("median"),
        **({"low": grid("low"), "high": grid("high")} if seeds[-1] > 1 else {}),
        "column_label": key,
        "label": f"{section.metric}, {several}",
    }
