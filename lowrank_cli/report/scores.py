"""The tables of ``scores.json``: by role, and the ranks or modules at both ends."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lowrank_cli.report import number_format, tables
from lowrank_cli.runs import Run
from lowrank_cli.runs.scores import FILE, SavedScores
from lowrank_cli.schema import KINDS

ENDS = 5  #: ranks or modules shown of each end
COLUMNS = ("module", "rank no.", "score")


def shown(run: Run) -> list[RenderableType]:
    """Tables of a run that scored ranks or modules; none for another."""
    if not run.done or not (run.path / FILE).is_file():
        return []
    saved = SavedScores.read(run.path)
    unit = number_format.unit(score for module in saved.modules for score in module["scores"])
    worth = {module["module"]: [score / unit for score in module["scores"]] for module in saved.modules}
    number = _format([value for values in worth.values() for value in values])
    says = f"{saved.kind}: {KINDS[saved.level][saved.kind]}{number_format.in_unit(unit)}"
    return [Text(says), _by_role(saved, worth, number), _ends(saved.level, worth, number)]


def _by_role(saved: SavedScores, worth: dict[str, list[float]], number: Callable[[float], str]) -> Table:
    """Roles, the one worth most first."""
    groups: dict[str, list[float]] = {}
    modules: dict[str, int] = {}
    for module in saved.modules:
        role = module["role"] or module["module"]
        groups.setdefault(role, []).extend(worth[module["module"]])
        modules[role] = modules.get(role, 0) + 1
    ranks = saved.level == "rank"
    table = _table("by role", "role", "modules", *(["ranks"] if ranks else []), "mean", "lowest", "highest")
    for role, values in sorted(groups.items(), key=lambda item: -sum(item[1]) / len(item[1])):
        counts = [str(modules[role]), *([str(len(values))] if ranks else [])]
        found = (sum(values) / len(values), min(values), max(values))
        tables.add(table, role, *counts, *map(number, found))
    return table


def _ends(level: str, worth: dict[str, list[float]], number: Callable[[float], str]) -> Table:
    scored = [(value, module, index) for module, values in worth.items() for index, value in enumerate(values)]
    scored.sort(key=lambda item: -item[0])
    few = len(scored) <= 2 * ENDS
    units = f"{len(scored)} {level}s"
    columns = COLUMNS if level == "rank" else [name for name in COLUMNS if name != "rank no."]
    table = _table(f"all {units}" if few else f"the {ENDS} highest and the {ENDS} lowest of {units}", *columns)
    for entry in scored if few else [*scored[:ENDS], None, *scored[-ENDS:]]:
        cells = ("…", "", "") if entry is None else (entry[1], str(entry[2]), number(entry[0]))
        tables.add(table, *(cell for cell, name in zip(cells, COLUMNS) if name in columns))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _format(values: list[float]) -> Callable[[float], str]:
    """How these numbers are written: with four digits of the largest, or three of each where they span decades."""
    if number_format.spans_decades(values):
        return lambda value: f"{value:.3g}"
    largest = max(map(abs, values), default=0.0)
    digits = max(0, 3 - math.floor(math.log10(largest))) if largest else 0
    return lambda value: f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus in front of nothing
