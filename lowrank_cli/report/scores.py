"""The tables of ``scores.json``: means by role, and the ranks or modules at both ends."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lowrank_cli.report import tables
from lowrank_cli.runs import Run

ENDS = 5  #: ranks or modules shown of each end
COLUMNS = ("module", "rank", "score")


def shown(run: Run) -> list[RenderableType]:
    """Tables of a run that scored ranks or modules; none for another."""
    if not run.done or not (run.path / "scores.json").is_file():
        return []
    record = run.read_json("scores.json")
    units = f"{record.get('level', 'rank')}s"
    return [_by_role(record, units), _ends(record, units)]


def _by_role(record: dict[str, Any], units: str) -> Table:
    groups: dict[str, list[float]] = {}
    for module in record["modules"]:
        groups.setdefault(module["role"] or module["module"], []).extend(module["scores"])
    table = _table(f"{record['kind']} scores by role", "role", units, "mean", "lowest", "highest")
    for role, scores in groups.items():
        found = (sum(scores) / len(scores), min(scores), max(scores))
        tables.add(table, role, str(len(scores)), *map(_number, found))
    return table


def _ends(record: dict[str, Any], units: str) -> Table:
    scored = [
        (score, module["module"], index) for module in record["modules"] for index, score in enumerate(module["scores"])
    ]
    scored.sort(key=lambda item: -item[0])
    columns = COLUMNS if units == "ranks" else [name for name in COLUMNS if name != "rank"]
    table = _table(f"highest and lowest of {len(scored)} {units}", *columns)
    few = len(scored) <= 2 * ENDS
    for entry in scored if few else [*scored[:ENDS], None, *scored[-ENDS:]]:
        cells = ("…", "", "") if entry is None else (entry[1], str(entry[2]), _number(entry[0]))
        tables.add(table, *(cell for cell, name in zip(cells, COLUMNS) if name in columns))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _number(value: float) -> str:
    return f"{value:.6g}"
