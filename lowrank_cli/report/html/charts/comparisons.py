"""Charts of a section of ``lrk compare``: values by seed, differences from the baseline, quality against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

from lowrank_cli.report.comparison import COSTS, Row, Section
from lowrank_cli.report.html.charts import svg
from lowrank_cli.report.html.charts.rows import WIDE, Rows, width_for
from lowrank_cli.report.html.charts.svg import Axis, Chart, Plot, add, finite
from lowrank_cli.report.number_format import count, duration, number, signed, size

FAR = 5  #: times the median of the scores, above which the worst gets a logarithmic axis
MIB = 2.0**20  #: bytes
#: Of each cost: the label of its axis, the unit in which ticks are round, and how a number of units is written.
COST_LABELS: dict[str, tuple[str, float, Callable[[float], str]]] = {
    "trainable": ("trainable parameters", 1.0, count),
    "seconds": ("training time", 1.0, duration),
    "memory": ("peak memory", MIB, lambda units: size(units * MIB)),
}


def values(section: Section) -> Chart:
    """Every seed's value, the interval of the median as a line, the median as a mark."""
    every = [value for row in section.rows for value in (*row.values.values(), row.low, row.high)]
    axis = Axis.over(section.metric, every, pad=0.05)
    names = [row.label for row in section.rows]
    width = width_for(names)
    plot = Rows(f"{section.metric} by seed", names, axis, row=28, width=width)
    for row, at in zip(section.rows, plot.middles, strict=True):
        if len(row.values) > 1:
            plot.span(row.low, row.high, at, "interval s0")
        for seed, value in row.values.items():
            plot.disc(value, at, 3.5, "dot faint s0", f"{row.label}\nseed {seed}: {number(value)}")
        plot.block(row.median, row.median, at, 14, "centre", f"{row.label}\nmedian {number(row.median)}")
    note = "Dots: seeds. Line: interval of the median. Tick: median."
    return Chart("Every seed", [("", plot.svg())], note=note, wide=width == WIDE)


def forest(section: Section) -> Chart | None:
    """Each row's mean difference from the baseline with its 95 % interval; None where nothing was compared."""
    compared = [row for row in section.rows if row.difference is not None]
    if not compared:
        return None
    ends = [
        end
        for row in compared
        if (difference := row.difference) is not None
        for end in (difference.low, difference.high, difference.mean, 0.0)
    ]
    baselines = {row.baseline.label for row in compared if row.baseline is not None}
    against = next(iter(baselines)) if len(baselines) == 1 else "the baseline"
    axis = Axis.over(f"{section.metric} minus that of {against}", ends, pad=0.06)
    names = [row.label for row in compared]
    width = width_for(names)
    plot = Rows(f"Differences from {against}", names, axis, row=28, width=width)
    plot.vertical(0, "reference")
    for row, at in zip(compared, plot.middles, strict=True):
        assert row.difference is not None
        low, high, mean = row.difference.low, row.difference.high, row.difference.mean
        tip = f"{row.label}\n{signed(mean)}"
        if low is not None and high is not None:
            tip += f" ({signed(low)} to {signed(high)})"
            plot.span(low, high, at, f"interval {_colour(low, high, section.lower_is_better)}")
            plot.disc(mean, at, 4.5, f"dot {_colour(low, high, section.lower_is_better)}", tip)
        else:
            plot.disc(mean, at, 4.5, "dot hollow s6", f"{tip}\nno interval: too few pairs")
    better = "left" if section.lower_is_better else "right"
    note = f"Mean difference with its 95 % interval; better is to the {better}. Grey: the interval holds 0."
    return Chart(f"Difference from {against}", [("", plot.svg())], note=note, wide=width == WIDE)


def _colour(low: float, high: float, lower_is_better: bool) -> str:
    """Blue where the interval says better, orange where it says worse, grey where it holds 0."""
    if low <= 0 <= high:
        return "s6"
    return "s0" if (high < 0) == lower_is_better else "s1"


def pareto(section: Section) -> Chart | None:
    """Median quality against each cost that tells rows apart, with the front as a line."""
    drawings = [drawing for cost in COSTS if (drawing := _front(section, cost)) is not None]
    note = "Filled: no other row is as good and cheaper. Dashed: the best that a budget reaches."
    return Chart(f"{section.metric} against cost", drawings, note=note, wide=True) if drawings else None


def _front(section: Section, cost: str) -> tuple[str, str] | None:
    label, unit, show = COST_LABELS[cost]
    rows = [row for row in section.rows if getattr(row, cost) is not None]
    costs = [getattr(row, cost) / unit for row in rows]
    if len({show(value) for value in costs}) < 2:
        return None
    x = Axis.over(label, costs, pad=0.1, log=max(costs) > 5 * min(costs) > 0)
    x.show = show
    y = Axis.over(section.metric, [row.median for row in rows], pad=0.12)
    plot = Plot(f"{section.metric} against {label}", x, y, width=318, height=230)
    front = sorted((at, row.median) for row, at in zip(rows, costs) if cost in row.pareto)
    corners = [corner for (_, before), (at, value) in pairwise(front) for corner in ((at, before), (at, value))]
    steps = [*front[:1], *corners]  # the best quality that a budget reaches
    plot.line([at for at, _ in steps], [value for _, value in steps], "s6", kind="line dashed")
    taken = [(plot.across(at) - 5, 10.0, plot.down(row.median) + 4) for row, at in zip(rows, costs)]
    for row, at in sorted(zip(rows, costs, strict=True), key=lambda pair: cost not in pair[0].pareto):
        on = cost in row.pareto
        tip = f"{row.label}\n{section.metric} {number(row.median)}\n{label} {show(at)}"
        plot.dot(at, row.median, "s0" if on else "s6", tip, radius=4.5, kind="dot" if on else "dot hollow")
        _name(plot, row, plot.across(at), plot.down(row.median), taken)
    return "", plot.svg()


def _name(plot: Plot, row: Row, x: float, y: float, taken: list[tuple[float, float, float]]) -> None:
    """The row's label beside its mark, unless it would cover another label or mark; it is on hover in any case.

    ``taken`` has the left end, width and base line of what is drawn.
    """
    width = svg.LETTER * len(row.label)
    for left, at in ((x + 8, y + 4), (x - 8 - width, y + 4), (x - width / 2, y - 9), (x - width / 2, y + 17)):
        free = all(left + width < other or other + wide < left or abs(at - base) > 11 for other, wide, base in taken)
        if free and left > plot.left and left + width < plot.right + 14:
            taken.append((left, width, at))
            add(plot.drawing, "text", row.label, x=left, y=at, class_="name")
            return


def of_section(section: Section) -> list[Chart]:
    """All charts of a section with several rows."""
    if len(section.rows) < 2:
        return []
    return [chart for chart in (values(section), forest(section), pareto(section)) if chart is not None]


def tuning(
    title: str, key: str, metric: str, arms: Sequence[tuple[str, Sequence[tuple[float, float]], float | None, bool]]
) -> Chart:
    """Mean score over the values of ``key`` for each arm.

    Args:
        arms: of each its name, pairs of value and score, the best value, and whether that is at an edge.
    """
    points = [value for _, pairs, _, _ in arms for value, _ in pairs]
    scores = finite(score for _, pairs, _, _ in arms for _, score in pairs)
    x = Axis.over(key, points, pad=0.04, log=min(points, default=0) > 0 and max(points) > 5 * min(points))
    distinct = sorted(set(points))
    x.marks, x.show = (distinct, lambda value: f"{value:g}") if len(distinct) <= 7 else (None, None)
    far = min(scores, default=0) > 0 and max(scores) > FAR * median(scores)
    plot = Plot(title, x, Axis.over(metric, scores, pad=0.08, log=far))
    for index, (name, pairs, best, at_edge) in enumerate(arms):
        colour = svg.series(index, len(arms))
        ordered = sorted(pairs)
        plot.line([value for value, _ in ordered], [score for _, score in ordered], colour)
        for value, score in ordered:
            plot.dot(value, score, colour, f"{name}\n{key} {value:g}\n{metric} {number(score)}", radius=2.5)
        for value, score in (pair for pair in ordered if pair[0] == best):
            edge = "\nat an edge of the search" if at_edge else ""
            tip = f"{name}\nbest: {key} {value:g}, {metric} {number(score)}{edge}"
            plot.dot(value, score, colour, tip, radius=6, kind="best")
            if at_edge:
                plot.dot(value, score, colour, tip, radius=10, kind="best edge")
    legend = [(name, svg.series(index, len(arms))) for index, (name, *_) in enumerate(arms)]
    return Chart(title, [("", plot.svg())], legend, note="Circle: the best value. Double circle: at an edge.")
