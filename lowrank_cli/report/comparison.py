"""A finished comparison and its three forms: terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowrank_cli.report.tables import NONE, add, count, duration, number, size

STAR = "★"


@dataclass
class Row:
    """One method with one setting, over its seeds."""

    method: str
    setting: str  #: ``key=value …`` of what varies in the section, or empty
    values: dict[int, float]  #: seed → metric
    median: float
    low: float  #: interval of the median, see :func:`lowrank_cli.report.statistics.median_interval`
    high: float
    trainable: float | None  #: parameters; these four are medians over the seeds
    activated: float | None  #: parameters
    seconds: float | None
    memory: float | None  #: bytes at the peak
    best: bool = False
    pairs: int | None = None  #: seeds shared with the baseline; None: not compared
    difference: float | None = None  #: mean of this row minus the baseline, over the pairs
    p_value: float | None = None

    @property
    def label(self) -> str:
        """How ``--baseline`` names this row."""
        return f"{self.method} {self.setting}".strip()


@dataclass
class Section:
    """One model on one task by one metric; rows from best median to worst."""

    model: str
    task: str
    metric: str
    lower_is_better: bool
    rows: list[Row]
    without_metric: int  #: finished runs that lack the metric
    repeats: int  #: older runs of a seed that a newer one stands for

    @property
    def title(self) -> str:
        better = "lower" if self.lower_is_better else "higher"
        return f"{self.model} · {self.task} · {self.metric} ({better} is better)"


def cells(section: Section, baseline: str | None) -> tuple[list[str], list[list[str]]]:
    """Headers and rows as people read them; columns that would say nothing in this section are left out."""
    settings = any(row.setting for row in section.rows)
    ranges = any((row.low, row.high) != _range(row) for row in section.rows)
    columns = {
        "method": [f"{row.method} {STAR}" if row.best else row.method for row in section.rows],
        "setting": [row.setting for row in section.rows] if settings else None,
        "n": [str(len(row.values)) for row in section.rows],
        "median": [number(row.median) for row in section.rows],
        "interval": [_span(row.low, row.high) if len(row.values) > 1 else NONE for row in section.rows],
        "range": [_span(*_range(row)) for row in section.rows] if ranges else None,
        f"vs {baseline}": [_versus(row) for row in section.rows] if baseline else None,
        "trainable": [_known(count, row.trainable) for row in section.rows],
        "activated": [_known(count, row.activated) for row in section.rows],
        "time": [_known(duration, row.seconds) for row in section.rows],
        "memory": [_known(size, row.memory) for row in section.rows],
    }
    columns = {header: column for header, column in columns.items() if column is not None}
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def _range(row: Row) -> tuple[float, float]:
    return min(row.values.values()), max(row.values.values())


def _span(low: float, high: float) -> str:
    return f"{number(low)}–{number(high)}"


def _versus(row: Row) -> str:
    if row.pairs is None or row.difference is None:
        return NONE
    p = NONE if row.p_value is None else f"{row.p_value:.2g}"
    return f"{'+' if row.difference >= 0 else ''}{number(row.difference)}, p {p}, n {row.pairs}"


def _known(show, value: float | None) -> str:
    return NONE if value is None else show(value)


def notes(sections: Sequence[Section], baseline: str | None, unfinished: int) -> list[str]:
    """Footnotes: what the columns mean and which runs are not in them."""
    lines = [
        "n counts seeds. interval: of the median, 95 % by order statistics from 6 seeds on; below, the range "
        "of the seeds, which covers the median with 75 % (3 seeds) to 94 % (5)."
    ]
    if baseline is not None:
        lines.append(
            f"vs {baseline}: mean difference over runs of the same seed, two-sided p of the exact sign-flip "
            "test; n pairs cannot give p below 2^(1-n), so 0.05 needs 6."
        )
    starred = any(row.best for section in sections for row in section.rows)
    rule = "the interval lies beyond every other row's, with at least 3 seeds in each"
    lines.append(f"{STAR} {rule}." if starred else f"No row is marked best: that needs that {rule}.")
    aside = {
        "not finished": unfinished,
        "without the metric": sum(section.without_metric for section in sections),
        "replaced by a newer run of the same seed": sum(section.repeats for section in sections),
    }
    left_out = ", ".join(f"{runs} {why}" for why, runs in aside.items() if runs)
    return [*lines, f"Left out: {left_out}."] if left_out else lines


def terminal(sections: Sequence[Section], baseline: str | None, footnotes: Sequence[str]) -> RenderableType:
    """The comparison for rich; best rows bold."""
    parts: list[RenderableType] = []
    for section in sections:
        headers, lines = cells(section, baseline)
        title = Text(section.title, style="bold")
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for header in headers:
            name = header in ("method", "setting")
            table.add_column(Text(header), overflow="fold", justify="left" if name else "right")
        for row, line in zip(section.rows, lines, strict=True):
            add(table, *(Text(cell, style="bold" if row.best else "") for cell in line))
        parts += [table, Text()]
    return Group(*parts, *(Text(note, style="dim") for note in footnotes))


def markdown(sections: Sequence[Section], baseline: str | None, footnotes: Sequence[str]) -> str:
    """The same tables and footnotes as GitHub Markdown."""
    lines = []
    for section in sections:
        headers, table = cells(section, baseline)
        lines += [f"### {section.title}", "", _line(headers), _line(["---"] * len(headers))]
        lines += [_line(line) for line in table]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in footnotes), ""])


def _line(line: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"


def csv_text(sections: Sequence[Section], baseline: str | None) -> str:
    """One line a row, numbers unrounded, absent ones empty; intervals are there for a single seed too."""
    records = []
    for section in sections:
        for row in section.rows:
            smallest, largest = _range(row)
            record = {
                "model": section.model,
                "task": section.task,
                "method": row.method,
                "setting": row.setting,
                "metric": section.metric,
                "lower_is_better": section.lower_is_better,
                "n": len(row.values),
                "median": row.median,
                "interval_low": row.low,
                "interval_high": row.high,
                "min": smallest,
                "max": largest,
                "best": row.best,
                "baseline": baseline,
                "pairs": row.pairs,
                "mean_difference": row.difference,
                "p_value": row.p_value,
                "trainable_parameters": row.trainable,
                "activated_parameters": row.activated,
                "seconds": row.seconds,
                "peak_memory_bytes": row.memory,
                "seeds": " ".join(map(str, row.values)),
                "values": " ".join(map(str, row.values.values())),
            }
            records.append(record)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()
