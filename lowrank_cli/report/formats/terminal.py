"""A comparison for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from lowrank_cli.report.comparison import Comparison
from lowrank_cli.report.formats.columns import LABELS, Columns, across_columns, across_title, section_columns
from lowrank_cli.report.formats.footnotes import footnotes
from lowrank_cli.report.tables import Trimmed, add


def terminal(comparison: Comparison) -> RenderableType:
    """Tables, best rows bold, then footnotes."""
    tables: list[RenderableType] = []
    for section in comparison.sections:
        columns = section_columns(section, comparison.baseline)
        tables.append(SplitTable(section.title, section.default_setting, columns, [row.best for row in section.rows]))
    for model in dict.fromkeys(result.model for result in comparison.across_tasks):
        columns = across_columns([result for result in comparison.across_tasks if result.model == model])
        tables.append(SplitTable(across_title(model, comparison), "", columns, [False] * len(columns.lines)))
    return Group(*tables, *(Trimmed(Text(note, style="dim")) for note in footnotes(comparison)))


@dataclass
class SplitTable:
    """One table; in a narrow terminal its groups of columns are tables of their own, each with the labels."""

    title: str
    subtitle: str
    columns: Columns
    bold: Sequence[bool]  #: of each line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        if self.subtitle:
            yield Text(self.subtitle, style="dim")
        groups = [[name] for name in dict.fromkeys(self.columns.groups) if name != "label"]
        joined = groups[:1]
        for group in groups[1:]:
            if self._width([*joined[-1], *group], console, options) <= options.max_width:
                joined[-1] += group
            else:
                joined.append(group)
        for group in joined:
            yield Trimmed(self._table(group))
            yield Text()

    def _width(self, groups: Sequence[str], console: Console, options: ConsoleOptions) -> int:
        return console.measure(self._table(groups), options=options.update(width=1000)).maximum

    def _table(self, groups: Sequence[str]) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0))
        headers = self.columns.headers
        shown = [i for i, group in enumerate(self.columns.groups) if group in ("label", *groups)]
        for i in shown:
            justify: JustifyMethod = "left" if headers[i] in LABELS else "right"
            table.add_column(headers[i], justify=justify, overflow="fold", no_wrap=headers[i] != "setting")
        for line, bold in zip(self.columns.lines, self.bold, strict=True):
            add(table, *(Text(line[i], style="bold" if bold else "") for i in shown))
        return table
