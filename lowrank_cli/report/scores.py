"""The tables of ``scores.json``: means by role and layer, and the ranks at both ends."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lowrank_cli.report import tables
from lowrank_cli.runs import Run

ENDS = 5  #: ranks shown of each end


def shown(run: Run) -> list[RenderableType]:
    """Tables of a run that scored ranks; none for another."""
    if not run.done or not (run.path / "scores.json").is_file():
        return []
    record = run.read_json("scores.json")
    return [_by_role(record), _ends(record)]


def _by_role(record: dict[str, Any]) -> Table:
    groups: dict[str, list[float]] = {}
    for module in record["modules"]:
        groups.setdefault(module["role"] or module["module"], []).extend(module["scores"])
    table = _table(f"{record['kind']} scores by role", "role", "ranks", "mean", "lowest", "highest")
    for role, scores in groups.items():
        found = (sum(scores) / len(scores), min(scores), max(scores))
        tables.add(table, role, str(len(scores)), *map(_number, found))
    return table


def _ends(record: dict[str, Any]) -> Table:
    ranks = [
        (score, module["module"], index) for module in record["modules"] for index, score in enumerate(module["scores"])
    ]
    ranks.sort(key=lambda item: -item[0])
    table = _table(f"highest and lowest of {len(ranks)} ranks", "module", "rank", "score")
    few = len(ranks) <= 2 * ENDS
    for entry in ranks if few else [*ranks[:ENDS], None, *ranks[-ENDS:]]:
        cells = ("…", "", "") if entry is None else (entry[1], str(entry[2]), _number(entry[0]))
        tables.add(table, *cells)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _number(value: float) -> str:
    return f"{value:.6g}"
