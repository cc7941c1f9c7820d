"""A comparison as GitHub Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_cli.report.comparison import Comparison
from lowrank_cli.report.formats.columns import Columns, across_columns, across_title, section_columns
from lowrank_cli.report.formats.footnotes import footnotes


def markdown(comparison: Comparison) -> str:
    """The tables and footnotes of the terminal."""
    lines = []
    for section in comparison.sections:
        subtitle = [section.default_setting, ""] if section.default_setting else []
        columns = section_columns(section, comparison.baseline)
        lines += [f"### {section.title}", "", *subtitle, *_table(columns), ""]
    for model in dict.fromkeys(result.model for result in comparison.across_tasks):
        columns = across_columns([result for result in comparison.across_tasks if result.model == model])
        lines += [f"### {across_title(model, comparison)}", "", *_table(columns), ""]
    return "\n".join([*lines, *(f"- {note}" for note in footnotes(comparison)), ""])


def _table(columns: Columns) -> list[str]:
    return [_line(line) for line in [columns.headers, ["---"] * len(columns.headers), *columns.lines]]


def _line(line: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
