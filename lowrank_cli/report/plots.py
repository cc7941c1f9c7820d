"""Pictures of a run: its losses, and whatever figures its stage described. matplotlib is imported late."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lowrank_cli.errors import UserError, escaped
from lowrank_cli.report import number_format
from lowrank_cli.report.tables import run_title
from lowrank_cli.runs import Run, atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

FEW_POINTS = 30  #: with fewer each train loss is marked
BOX = 5  #: with fewer values quartiles mean little, so there is no box
FALL = 5  #: times the last train losses; a first one above that gets a logarithmic axis
LETTER = 0.085  #: width of a letter of a title, in inches; 0.7 inches are lost beside the axes
MANY_ROWS = 40  #: of discs: with more there is a panel for each kind of row
ANNOTATED_CELLS = 300  #: a heatmap with more cells shows colours only
TRAIN, DEV, RATE, REFERENCE = "#0072b2", "#d55e00", "#f1f3f5", "#5d5d5d"
STYLE = Path(__file__).with_name("style.mplstyle")


def draw(run: Run) -> list[Path]:
    """Write ``plots/loss.png`` from ``history.jsonl`` and one picture for each entry of ``figures.json``.

    An entry has ``file``, ``kind``, ``title``, ``rows``, ``columns``, ``values`` (rows × columns; None or NaN
    where there is none) and ``label`` (what a value is). ``heatmap`` is a grid of cells, framed where the optional
    ``outlined`` (rows × columns) is true; ``heatmaps`` draws ``panels``, each with ``title`` and ``values`` of its own,
    as small grids of one scale; the colours of both go from 0 to the largest value, to both sides of 0 where some are
    negative, logarithmically where they span decades, or over the optional ``scale``. With ``in_units`` a heatmap is
    of values of any size, shown in a power of a thousand.
    ``lines`` draws each row as a line over the numbers in ``columns``, with optional ``low`` and ``high`` (rows ×
    columns) as a band; ``box`` draws the values of each row, which may differ in number, as a box with its points;
    ``bubbles`` a disc for each value as colour, its area from ``sizes`` (rows × columns; ``size_label`` says what they
    are), over the numbers in ``columns``, the colours from 0 or over ``scale``; many rows are in panels if
    ``panel_of`` names the panel of each row and ``panel_rows`` its name there; ``bars`` draws a group of bars for
    each row, one a column, with error bars from ``low`` to ``high`` (rows × columns). Optional ``row_label`` and
    ``column_label`` name the axes.
    Returns the files written, none where there is nothing to draw.
    """
    history = run.history()
    pictures = {}
    if any("train/loss" in row or "dev/loss" in row for row in history):
        pictures["loss.png"] = loss(history, _literal(run_title(run.info)))
    if (run.path / "figures.json").is_file():
        pictures |= {entry["file"]: picture(entry) for entry in run.read_json("figures.json")}
    written = []
    for name, figure in pictures.items():
        written.append(run.file(f"plots/{name}"))
        write(figure, written[-1])
    return written


def picture(entry: dict[str, Any]) -> Figure:
    """The picture of one entry. Raises UserError where its rows, columns and values do not go together."""
    kinds = {"heatmap": heatmap, "heatmaps": heatmaps, "lines": lines, "box": box, "bubbles": bubbles, "bars": bars}
    try:
        return kinds[entry["kind"]](_literal(entry))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"figures.json: '{entry['file']}' cannot be drawn ({type(error).__name__}: {error})") from error


def _literal(value: Any) -> Any:
    """``value`` with every text in it as it stands: no formulas, no control characters."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return escaped(value).replace("$", r"\$") if isinstance(value, str) else value


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """``draw`` in the style of all plots, whatever the user's matplotlibrc says."""

    @wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> T:
        from matplotlib import rc_context

        with rc_context(fname=STYLE):
            return draw(*args, **kwargs)

    return in_style


@styled
def write(figure: Figure, file: Path) -> None:
    """Save ``figure`` as PNG, whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    atomic_write(file, image.getvalue())


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of its own (inches), drawn by Agg, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _whole(values: Iterable[float]) -> bool:
    """Whether all finite values are whole numbers: ranks, steps, layers."""
    return all(float(value).is_integer() for value in values if math.isfinite(value))


def _whole_ticks(axis: Any) -> None:
    """No ticks between whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _series(history: Iterable[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    rows = [(row["step"], row[key]) for row in history if row.get(key) is not None]
    return [step for step, _ in rows], [value for _, value in rows]


@styled
def loss(history: list[dict[str, Any]], heading: str) -> Figure:
    """Train and dev loss over steps, the best dev step marked, the learning rate shaded behind them."""
    figure, axes = _figure(7.2, 4.2)
    steps, rates = _series(history, "learning_rate")
    if steps:
        behind = axes.twinx()
        behind.fill_between(steps, rates, color=RATE, linewidth=0)
        behind.set_ylim(0, max([rate for rate in rates if math.isfinite(rate)] or [0]) * 1.05 or 1)
        behind.set_ylabel("learning rate")
        behind.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        behind.spines[:].set_visible(False)
        behind.grid(False)
        axes.set_zorder(behind.get_zorder() + 1)
        axes.patch.set_visible(False)
    steps, values = _series(history, "train/loss")
    crowded = len(steps) > 100
    if crowded:
        axes.plot(steps, values, color=TRAIN, linewidth=0.8, alpha=0.4)
        values = _smooth(values, len(values) // 40)
    label, marker = ("train (smoothed)", None) if crowded else ("train", "o" if len(steps) <= FEW_POINTS else None)
    axes.plot(steps, values, color=TRAIN, marker=marker, label=label)
    if _falls_far(values):
        axes.set_yscale("log")
    steps, values = _series(history, "dev/loss")
    if steps:
        axes.plot(steps, values, color=DEV, marker="o", label="dev")
    steps, values = _series((row for row in history if not row.get("not_kept")), "dev/loss")
    finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if finite:
        value, step = min(finite)
        axes.axvline(step, color=DEV, linewidth=0.9, linestyle=":")
        axes.plot(
            [step],
            [value],
            marker="o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=DEV,
            linestyle="none",
            label=f"best dev: {value:.4g} at step {step}",
        )
    axes.set_title(heading)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_xlim(left=0)
    _whole_ticks(axes.xaxis)
    axes.legend()
    return figure


def _falls_far(values: list[float]) -> bool:
    """Whether the first losses are so far above the last that a linear axis would flatten the rest."""
    finite = [value for value in values if math.isfinite(value)]
    return len(finite) > 1 and min(finite) > 0 and finite[0] > FALL * median(finite[-5:])


def _smooth(values: list[float], reach: int) -> list[float]:
    """Mean of the finite values up to ``reach`` places away."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    finite = ([value for value in window if math.isfinite(value)] for window in windows)
    return [sum(window) / len(window) if window else math.nan for window in finite]


@styled
def heatmap(entry: dict[str, Any]) -> Figure:
    """Rows × columns of coloured cells; the values are written in while there are few."""
    from matplotlib.patches import Rectangle

    rows, columns, values = entry["rows"], entry["columns"], _numbers(entry["values"])
    unit = number_format.unit(_finite(values)) if entry.get("in_units") else 1.0
    values = [[value / unit for value in line] for line in values]
    cell = 0.55 if len(columns) <= 20 else 11 / len(columns)
    height = min(max(0.32 * len(rows), 1.0), 12)
    width = max(cell * len(columns), 2.2) + 2.2
    figure, axes = _figure(width, height + 1.3)
    finite = _finite(values)
    axes.set_facecolor("#eeeeee")  # shows through where a value is missing
    image = axes.imshow(values, **_colours(entry, finite), aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), [str(row) for row in rows])
    _cells_only(axes)
    if len(rows) * len(columns) <= ANNOTATED_CELLS:
        _write_in(axes, image, values, _digits(finite), 8)
    for y, line in enumerate(entry.get("outlined", [])):
        for x in (x for x, framed in enumerate(line) if framed):
            style: dict[str, Any] = {"edgecolor": DEV, "linewidth": 2.2, "joinstyle": "miter", "clip_on": False}
            axes.add_patch(Rectangle((x - 0.44, y - 0.42), 0.88, 0.84, fill=False, **style))
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=max(10, 2 * len(rows)))
    if _whole(finite) and not number_format.spans_decades(finite):
        _whole_ticks(bar.ax.yaxis)
    bar.set_label(f"{entry.get('label', '')}{number_format.in_unit(unit)}")
    bar.outline.set_visible(False)
    axes.set_title(textwrap.fill(entry["title"], int((width - 0.7) / LETTER)))
    axes.set_ylabel(entry.get("row_label", ""))
    axes.set_xlabel(entry.get("column_label", ""))
    return figure


def _finite(values: list[list[float]]) -> list[float]:
    return [value for line in values for value in line if math.isfinite(value)] or [0.0]


def _scale(*colours: str) -> Any:
    """A colour map through ``colours``."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("values", colours)


def _cells_only(axes: Any) -> None:
    """No lines but the white ones between cells."""
    from matplotlib.ticker import IndexLocator

    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(IndexLocator(1, 0))
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", axis="both", color="white", linewidth=1)


def _colours(entry: dict[str, Any], finite: list[float]) -> dict[str, Any]:
    """The colours of a heatmap and where they begin and end."""
    from matplotlib.colors import LogNorm, Normalize

    if "scale" in entry:
        return {"cmap": _scale("#ffffff", TRAIN), "norm": Normalize(*entry["scale"])}
    if min(finite) < 0:
        most = max(map(abs, finite))
        return {"cmap": _scale(DEV, "#ffffff", TRAIN), "norm": Normalize(-most, most)}
    if number_format.spans_decades(finite):
        return {
            "cmap": _scale("#ffffff", TRAIN),
            "norm": LogNorm(min(value for value in finite if value > 0), max(finite)),
        }
    return {"cmap": _scale("#ffffff", TRAIN), "norm": Normalize(0, max(finite) or 1)}


def _write_in(axes: Any, image: Any, values: list[list[float]], digits: str, size: int) -> None:
    """Each value in its cell, in an ink that shows on its colour."""
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            text = format(value, digits if abs(value) < 100 else ".0f") if math.isfinite(value) else "–"
            red, green, blue, opaque = image.to_rgba(value)
            dark = opaque and 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            axes.text(x, y, text, ha="center", va="center", fontsize=size, color="white" if dark else "#16191d")


def _digits(values: list[float]) -> str:
    """How to write the values of one picture: none behind the point for whole numbers, otherwise about three in all.

    Of values that span decades each has two.
    """
    if number_format.spans_decades(values) and not _whole(values):
        return ".2g"
    largest = max(map(abs, values))
    return ".0f" if largest >= 100 or _whole(values) else f".{1 + (largest < 10)}f"


@styled
def heatmaps(entry: dict[str, Any]) -> Figure:
    """Small multiples: grids of the same rows and columns in one colour scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns, panels = entry["rows"], entry["columns"], entry["panels"]
    grids = [_numbers(panel["values"]) for panel in panels]
    across = min(len(panels), 2 if len(columns) > 16 or len(panels) == 4 else 3)
    down = math.ceil(len(panels) / across)
    width = 0.9 + min(max(0.26 * len(columns), 1.6), 5.5)  # inches of a panel
    figure = Figure(figsize=(width * across + 1, (0.2 * len(rows) + 0.7) * down + 0.6))
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False)
    finite = _finite([line for grid in grids for line in grid])
    colours = _colours(entry, finite)
    for at, place in enumerate(axes.flat):
        if at >= len(panels):
            place.set_visible(False)
            continue
        image = place.imshow(grids[at], **colours, aspect="auto", interpolation="nearest")
        place.set_title(panels[at]["title"], fontsize=8, fontweight="normal")
        place.set_yticks(range(len(rows)), [str(row) for row in rows], fontsize=6)
        step = math.ceil(len(columns) / 16)
        place.set_xticks(range(0, len(columns), step), [str(column) for column in columns[::step]], fontsize=6)
        _cells_only(place)
        if len(columns) <= 16:
            _write_in(place, image, grids[at], _digits(finite), 6)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    if _whole(finite) and not number_format.spans_decades(finite):
        _whole_ticks(bar.ax.yaxis)
    bar.set_label(entry.get("label", ""))
    bar.outline.set_visible(False)
    figure.suptitle(entry["title"], x=0.01, ha="left")
    figure.supxlabel(entry.get("column_label", ""))
    return figure


@styled
def lines(entry: dict[str, Any]) -> Figure:
    """Each row of values as a line over the numbers in ``columns``, from ``low`` to ``high`` if these are given.

    That is a band; of more than two lines a bar at every point, side by side. Numbers that double, or grow by another
    factor, stand at equal distances.
    """
    from matplotlib.ticker import NullLocator

    figure, axes = _figure(7.2, 4.2)
    axes.set_prop_cycle(color=series_colours(len(entry["rows"])))
    columns, table = entry["columns"], _numbers(entry["values"])
    factor = _factor(columns)
    lows, highs = (_numbers(entry.get(key, [])) for key in ("low", "high"))
    bars = bool(lows) and len(lows) > 2
    for at, (name, values) in enumerate(zip(entry["rows"], table, strict=True)):
        places = _beside_each_other(columns, factor, 0.06 * (at - (len(table) - 1) / 2)) if bars else columns
        (line,) = axes.plot(places, values, marker="o", label=textwrap.fill(str(name), 26))
        if bars:
            axes.vlines(places, lows[at], highs[at], color=line.get_color(), alpha=0.5, linewidth=1.2)
        elif lows:
            axes.fill_between(columns, lows[at], highs[at], color=line.get_color(), alpha=0.15, linewidth=0)
    for axis, values in ((axes.xaxis, columns), (axes.yaxis, [value for line in table for value in line])):
        if _whole(values):
            _whole_ticks(axis)
    if factor:
        axes.set_xscale("log")
        axes.set_xticks(columns, [f"{value:g}" for value in columns])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(entry["title"])
    axes.set_xlabel(entry.get("column_label", ""))
    axes.set_ylabel(entry.get("label", ""))
    if len(table) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def series_colours(count: int) -> list[Any]:
    """A colour for each of ``count`` series: the default ones, or shades where there are more."""
    from matplotlib import rcParams
    from numpy import linspace

    cycle = rcParams["axes.prop_cycle"].by_key()["color"]
    return cycle[:count] if count <= len(cycle) else list(_scale("#cfe3f0", TRAIN)(linspace(0, 1, count)))


def _factor(columns: list[float]) -> float | None:
    """By what each of at least three numbers is larger than the one before, if it is the same for all."""
    if len(columns) < 3 or min(columns) <= 0:
        return None
    ratios = [after / before for before, after in pairwise(columns)]
    return ratios[0] if max(ratios) < 1.01 * min(ratios) and ratios[0] > 1.5 else None


def _beside_each_other(columns: list[float], factor: float | None, shift: float) -> list[float]:
    """``columns`` moved by the share ``shift`` of their distance."""
    if factor:
        return [value * factor**shift for value in columns]
    gap = min((after - before for before, after in pairwise(columns)), default=1.0)
    return [value + shift * gap for value in columns]


@styled
def box(entry: dict[str, Any]) -> Figure:
    """Each row's values as points with mean and median; from ``BOX`` values on with a box, whiskers to the extremes."""
    width = max(3.6, 1.1 * len(entry["rows"]) + 1.6)
    figure, axes = _figure(width, 4.2)
    places = range(1, len(entry["rows"]) + 1)
    for place, values in zip(places, entry["values"], strict=True):
        boxed = len(values) >= BOX
        drawn = axes.boxplot(
            [values],
            positions=[place],
            whis=(0, 100),
            widths=0.5,
            showmeans=True,
            showbox=boxed,
            showcaps=boxed,
            whiskerprops={"visible": boxed},
            medianprops={"color": DEV},
            meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": DEV, "markersize": 5},
        )
        apart = [place + 0.06 * offset for offset in _beside(values)]
        axes.plot(apart, values, linestyle="none", marker="o", markersize=3, color=TRAIN, alpha=0.6)
    shown = [drawn["medians"][0], drawn["means"][0]]
    axes.legend(shown, ["median", "mean"], loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_xticks(list(places), [f"{name}\n(n = {len(v)})" for name, v in zip(entry["rows"], entry["values"])])
    axes.set_title(textwrap.fill(entry["title"], int((width - 0.7) / LETTER)))
    axes.set_ylabel(entry.get("label", ""))
    return figure


def _beside(values: list[float]) -> list[float]:
    """For each value how many places it stands beside the middle, so that equal ones do not cover each other."""
    seen: dict[float, int] = {}
    found = []
    for value in values:
        number = seen[value] = seen.get(value, -1) + 1
        found.append((number + 1) // 2 * (-1) ** number)
    return found


@styled
def bubbles(entry: dict[str, Any]) -> Figure:
    """Each value as the colour of a disc, its area in proportion to ``sizes``, row by row over ``columns``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = entry["rows"], entry["columns"]
    values, sizes = _numbers(entry["values"]), _numbers(entry["sizes"])
    panels: dict[str, list[int]] = {"": list(range(len(rows)))}
    names = rows
    if "panel_of" in entry and len(rows) > MANY_ROWS:
        titles, names = entry["panel_of"], entry["panel_rows"]
        panels = {title: [at for at, own in enumerate(titles) if own == title] for title in dict.fromkeys(titles)}
    across, most = min(len(panels), 4), max(map(len, panels.values()))
    width = min(max(0.4 * len(columns), 2.6 if across > 1 else 5.0), 12 / across)  # inches of a panel
    height = min(max((0.17 if across > 1 else 0.22) * most, 2.0), 16) + 0.4
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(across * width + 1.5, down * height + 0.8))
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False, sharex=True)
    largest, area = max((size for line in sizes for size in line), default=0) or 1, 60 if across > 1 else 120
    low, high = entry.get("scale", (0, max(_finite(values))))
    for at, place in enumerate(axes.flat):
        if at >= len(panels):
            place.set_visible(False)
            continue
        title, here = list(panels.items())[at]
        discs = place.scatter(
            columns * len(here),
            [y for y in range(len(here)) for _ in columns],
            c=[value for row in here for value in values[row]],
            s=[area * size / largest for row in here for size in sizes[row]],
            cmap=_scale("#e3f0f8", TRAIN),
            edgecolors=TRAIN,
            linewidths=0.5,
            vmin=low,
            vmax=high,
        )
        place.set_yticks(range(len(here)), [str(names[row]) for row in here], fontsize=7)
        if _whole(columns):
            _whole_ticks(place.xaxis)
        place.set_ylim(len(here) - 0.5, -0.5)
        place.set_title(title, fontsize=8, fontweight="normal")
    for place in axes[-1] if across == 1 else ():
        place.set_xlabel(entry.get("column_label", ""))
    if across > 1:
        figure.supxlabel(entry.get("column_label", ""))
    figure.suptitle(textwrap.fill(entry["title"], 70), x=0.01, ha="left")
    figure.colorbar(discs, ax=axes, pad=0.02).set_label(entry.get("label", ""))
    marks, names = discs.legend_elements("sizes", num=4, fmt="{x:.3g}", func=lambda areas: areas * largest / area)
    figure.legend(marks, names, ncols=len(names), title=entry.get("size_label"), loc="outside lower right")
    return figure


@styled
def bars(entry: dict[str, Any]) -> Figure:
    """A group of bars for each row, one bar a column, with error bars and a line at 1."""
    rows, columns = entry["rows"], entry["columns"]
    inches = min(max(1.1 * len(rows) + 1.5, 5.0), 14)
    figure, axes = _figure(inches, 4.2)
    width = 0.8 / len(columns)
    for at, column in enumerate(columns):
        places = [place + (at - (len(columns) - 1) / 2) * width for place in range(len(rows))]
        values, low, high = ([line[at] for line in _numbers(entry[key])] for key in ("values", "low", "high"))
        reach = [[v - x for v, x in zip(values, low)], [x - v for v, x in zip(values, high)]]
        drawn = axes.bar(places, values, width, yerr=reach, capsize=3, error_kw={"linewidth": 0.9}, label=str(column))
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    axes.axhline(1, color=REFERENCE, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(rows)), [textwrap.fill(str(row), 14, break_long_words=False) for row in rows])
    axes.set_title(textwrap.fill(entry["title"], int((inches - 0.7) / LETTER)))
    axes.set_ylabel(entry.get("label", ""))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _numbers(values: Iterable[Iterable[float | None]]) -> list[list[float]]:
    return [[math.nan if value is None else float(value) for value in line] for line in values]
