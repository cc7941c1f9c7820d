"""The columns of a comparison's tables as people read them, in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank_cli.report.comparison import AcrossTasks, Comparison, Difference, Row, Section
from lowrank_cli.report.number_format import count, duration, number, signed, size
from lowrank_cli.report.tables import NONE

STAR = "★"
PARETO = "◆"
BOUND = "†"
LABELS = ("method", "setting")


@dataclass
class Columns:
    """A table: headers, which group of columns each belongs to, and the lines."""

    headers: list[str]
    groups: list[str]  #: ``label``, ``quality``, ``difference`` or ``cost``
    lines: list[list[str]]


def section_columns(section: Section, baseline: str | None) -> Columns:
    """The table of a section, without the columns that would be empty or repeat another."""
    rows = section.rows
    tested = baseline is not None

    def of_difference(show: Callable[[Difference], str]) -> Callable[[Row], str]:
        return lambda row: NONE if row.difference is None else show(row.difference)

    columns: dict[str, tuple[bool, str, Callable[[Row], str]]] = {
        "method": (
            True,
            "label",
            lambda row: f"{row.method} {STAR if row.best else BOUND if row.bound else ''}".rstrip(),
        ),
        "setting": (any(row.setting for row in rows), "label", lambda row: row.setting),
        "n": (True, "quality", lambda row: str(len(row.values))),
        "median": (True, "quality", lambda row: number(row.median)),
        "interval": (True, "quality", lambda row: _span(row.low, row.high) if len(row.values) > 1 else NONE),
        "range": (
            any((row.low, row.high) != row.range for row in rows),
            "quality",
            lambda row: _span(*row.range),
        ),
        "std": (any(row.std is not None for row in rows), "quality", lambda row: _known(number, row.std)),
        "std within": (
            any(row.arrangement_worst is not None for row in rows),
            "quality",
            lambda row: _known(number, row.arrangement_std),
        ),
        "worst": (
            any(row.arrangement_worst is not None for row in rows),
            "quality",
            lambda row: _known(number, row.arrangement_worst),
        ),
        f"vs {(baseline or '').partition(' ')[0]}": (tested, "difference", of_difference(lambda d: signed(d.mean))),
        "95 % interval": (tested, "difference", of_difference(lambda d: interval(d.low, d.high))),
        "p (Holm)": (tested, "difference", of_difference(lambda d: p_text(d.p_holm))),
        "sign-flip": (tested, "difference", of_difference(_sign_flip)),
        "detectable": (tested, "difference", of_difference(lambda d: plus_minus(d.detectable))),
        "trainable": (True, "cost", lambda row: _cost(row, "trainable", count)),
        "activated": (
            any(row.activated not in (None, row.trainable) for row in rows),
            "cost",
            lambda row: _known(count, row.activated),
        ),
        "train time": (True, "cost", lambda row: _cost(row, "seconds", duration)),
        "memory": (True, "cost", lambda row: _cost(row, "memory", size)),
    }
    kept = {header: column for header, column in columns.items() if column[0]}
    lines = [[show(row) for _, _, show in kept.values()] for row in rows]
    return Columns(list(kept), [group for _, group, _ in kept.values()], lines)


def across_columns(results: Sequence[AcrossTasks]) -> Columns:
    """The table of the results over several tasks, of one model."""
    headers = ["method", "tasks", "pairs", "difference", "95 % interval", "p (Holm)", "sign-flip", "detectable"]
    lines = [
        [
            result.method,
            str(result.tasks),
            str(result.pairs),
            signed(result.mean),
            interval(result.low, result.high),
            p_text(result.p_holm),
            p_text(result.sign_flip),
            plus_minus(result.detectable),
        ]
        for result in results
    ]
    return Columns(headers, ["label", *["difference"] * (len(headers) - 1)], lines)


def across_title(model: str, comparison: Comparison) -> str:
    """The heading of that table."""
    return f"{model} · all tasks together, against {comparison.baseline}"


def interval(low: float | None, high: float | None) -> str:
    """The interval of a difference."""
    return NONE if low is None or high is None else f"{signed(low)} to {signed(high)}"


def p_text(value: float | None) -> str:
    """A p-value with three decimals."""
    return NONE if value is None else f"{value:.3f}" if value >= 0.001 else "<0.001"


def plus_minus(value: float | None) -> str:
    """The size of a difference of either sign."""
    return NONE if value is None else f"±{number(value)}"


def _sign_flip(difference: Difference) -> str:
    return NONE if difference.sign_flip is None else f"{p_text(difference.sign_flip)} ({difference.pairs})"


def _span(low: float, high: float) -> str:
    return f"{number(low)}–{number(high)}"


def _cost(row: Row, cost: str, show: Callable[[float], str]) -> str:
    text = _known(show, getattr(row, cost))
    return f"{text} {PARETO}" if cost in row.pareto else text


def _known(show: Callable[[float], str], value: float | None) -> str:
    return NONE if value is None else show(value)
