"""``lrk compare --across-tasks``: each method against the baseline over all tasks together, paired by task and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.console import RenderableType
from rich.text import Text

from lowrank_cli.errors import UserError
from lowrank_cli.report.comparison import Row, Section
from lowrank_cli.report.statistics import sign_flip_test
from lowrank_cli.report.tables import NONE, Fitted, number

HEADERS = ["method", "tasks", "pairs", "difference", "p", "p by seed"]


@dataclass(frozen=True)
class Pooled:
    """One method on one model."""

    model: str
    method: str  #: with its setting, where a task has several rows of the method
    tasks: int
    pairs: int
    difference: float  #: mean over the pairs; of losses that of their logarithms
    p_value: float | None  #: of the sign-flip test over all pairs
    p_by_seed: float | None  #: the same over the means by seed: for pairs that share what was prepared for a seed


def pooled(sections: Sequence[Section]) -> list[Pooled]:
    """Over the rows that were tested against a baseline, in the order of their first task.

    Raises:
        UserError: no model has a method with pairs on two tasks.
    """
    several = {(s.model, row.method) for s in sections for row in s.rows if _count(s, row.method) > 1}
    grouped: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for section in sections:
        for row in section.rows:
            if row.compared_to is not None:
                name = row.label if (section.model, row.method) in several else row.method
                differences = _differences(row, row.compared_to, section.metric.endswith("loss"))
                grouped.setdefault((section.model, name), {})[section.task] = differences
    found = []
    for (model, name), tasks in grouped.items():
        by_seed: dict[int, list[float]] = {}
        for differences in tasks.values():
            for seed, difference in differences.items():
                by_seed.setdefault(seed, []).append(difference)
        every = [difference for own in by_seed.values() for difference in own]
        if len(tasks) > 1 and every:
            means = [fmean(own) for own in by_seed.values()]
            tests = sign_flip_test(every), sign_flip_test(means)
            found.append(Pooled(model, name, len(tasks), len(every), fmean(every), *tests))
    if not found:
        raise UserError("--across-tasks: no method shares seeds with the baseline on two tasks of a model")
    return found


def _count(section: Section, method: str) -> int:
    return sum(row.method == method for row in section.rows)


def _differences(row: Row, baseline: Row, logarithms: bool) -> dict[int, float]:
    """Seed → difference. Logarithms of losses make tasks comparable: −0.1 is about 10 % less on each."""
    scale = math.log if logarithms else float
    shared = sorted(row.values.keys() & baseline.values.keys())
    return {seed: scale(row.values[seed]) - scale(baseline.values[seed]) for seed in shared}


def terminal(found: Sequence[Pooled], baseline: str) -> list[RenderableType]:
    """A table for each model."""
    tables: list[RenderableType] = []
    for model in dict.fromkeys(item.model for item in found):
        table = Fitted(f"{model} · all tasks together, against {baseline}", HEADERS, leave_out=[])
        table.rows += [_cells(item) for item in found if item.model == model]
        tables += [table, Text()]
    return tables


def markdown(found: Sequence[Pooled], baseline: str) -> str:
    """The same as GitHub Markdown."""
    lines = []
    for model in dict.fromkeys(item.model for item in found):
        rows = [HEADERS, ["---"] * len(HEADERS), *(_cells(item) for item in found if item.model == model)]
        lines += [f"### {model} · all tasks together, against {baseline}", ""]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows] + [""]
    return "\n".join(lines)


def note(sections: Sequence[Section]) -> str:
    """What the table means."""
    logarithms = " (of losses: of their logarithms)" if any(s.metric.endswith("loss") for s in sections) else ""
    return (
        f"All tasks together: mean difference over pairs of the same task and seed{logarithms}; p of the sign-flip "
        "test over all pairs, and over the means by seed (pairs of a seed are not independent where they share a run)."
    )


def _cells(item: Pooled) -> list[str]:
    difference = f"{'+' if item.difference >= 0 else ''}{number(item.difference)}"
    return [item.method, str(item.tasks), str(item.pairs), difference, _p(item.p_value), _p(item.p_by_seed)]


def _p(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}" if value >= 0.001 else "<0.001"
