"""Training curves from ``history.jsonl``: losses in one chart, every other number that was logged in its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lowrank_cli.report.html.charts.svg import Axis, Chart, Plot, finite
from lowrank_cli.report.number_format import number

POINTS = 200  #: of a line; longer ones are thinned
CROWDED = 100  #: from here on the train loss is smoothed
FALL = 5  #: times the last losses; a first one above that gets a logarithmic axis
LOSSES = ("train/loss", "dev/loss")
NOT_DRAWN = {"step", "train/tokens", "train/seconds", *LOSSES}

Line = tuple[list[float], list[float]]  #: steps and values


def charts(history: Sequence[dict[str, Any]]) -> list[Chart]:
    """The losses, then the other numbers by name, none for a quantity with a single value."""
    drawn = [loss(history)] if any(row.get(key) is not None for row in history for key in LOSSES) else []
    names = dict.fromkeys(key for row in history for key, value in row.items() if _is_number(value))
    for name in sorted(names.keys() - NOT_DRAWN, key=lambda name: (name == "learning_rate", name)):
        steps, values = line = _line(history, name)
        if len(line[0]) > 1:
            plot = Plot(name, Axis.over("step", [0, *steps]), Axis.over(_words(name), values, pad=0.06), height=180)
            _draw(plot, line, "s2", _words(name))
            drawn.append(Chart(_words(name).capitalize(), [("", plot.svg())]))
    return drawn


def loss(history: Sequence[dict[str, Any]]) -> Chart:
    """Train and dev loss; the step with the lowest dev loss that a checkpoint was kept of is marked."""
    train, dev = (_line(history, key) for key in LOSSES)
    crowded = len(train[0]) > CROWDED
    shown = (train[0], _smooth(train[1], len(train[1]) // 40)) if crowded else train
    values = finite([*shown[1], *dev[1]])
    falls = bool(values) and min(values) > 0 and max(values) > FALL * sorted(values)[len(values) // 2]
    x = Axis.over("step", [0, *train[0], *dev[0]])
    plot = Plot("Loss over training steps", x, Axis.over("loss", values, pad=0.06, log=falls))
    _draw(plot, shown, "s0", "train loss")
    _draw(plot, dev, "s1", "dev loss")
    kept = _line((row for row in history if not row.get("not_kept")), "dev/loss")
    best = min(((value, step) for step, value in zip(*kept) if math.isfinite(value)), default=None)
    if best is not None:
        plot.dot(best[1], best[0], "s1", f"best dev loss {number(best[0])}\nstep {best[1]:g}", radius=6, kind="best")
    legend = [("train, smoothed" if crowded else "train", "s0")] if train[0] else []
    legend += [("dev", "s1")] if dev[0] else []
    note = f"Circle: lowest dev loss, {number(best[0])} at step {best[1]:g}." if best else ""
    return Chart("Loss", [("", plot.svg())], legend, note)


def _draw(plot: Plot, line: Line, colour: str, name: str) -> None:
    stride = math.ceil(len(line[0]) / POINTS) or 1
    at = range((len(line[0]) - 1) % stride, len(line[0]), stride) if line[0] else ()  # the last is always there
    steps, values = [line[0][i] for i in at], [line[1][i] for i in at]
    drawable = [value if plot.y.low <= value <= plot.y.high else None for value in values]
    plot.line(steps, drawable, colour)
    for step, value in zip(steps, drawable, strict=True):
        if value is not None:
            tip = f"step {step:g}\n{name} {number(value)}"
            plot.dot(step, value, colour, tip, radius=2.5, kind="dot" if len(steps) <= 40 else "hit")


def _line(history: Iterable[dict[str, Any]], key: str) -> Line:
    rows = [(float(row["step"]), float(row[key])) for row in history if _is_number(row.get(key))]
    return [step for step, _ in rows], [value for _, value in rows]


def _smooth(values: list[float], reach: int) -> list[float]:
    """Mean of the finite values up to ``reach`` positions away."""
    windows = (finite(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values)))
    return [sum(window) / len(window) if window else math.nan for window in windows]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("/", " ")
