"""A finished comparison and its three forms: terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from lowrank_cli.report.tables import NONE, Trimmed, add, count, duration, number, size

STAR = "★"
SETTING = re.compile(r" (?=[\w.]+=)")  #: between the parts of a row's setting
LABELS = ("method", "setting")
COSTS = ("trainable", "activated", "train time", "memory")


@dataclass
class Row:
    """One method with one setting, over its seeds."""

    method: str
    setting: str  #: ``key=value …`` of what varies in the section and is not what most runs have, or empty
    values: dict[int, float]  #: seed → metric
    median: float
    low: float  #: interval of the median, see :func:`lowrank_cli.report.statistics.median_interval`
    high: float
    trainable: float | None  #: parameters; these four are medians over the seeds
    activated: float | None  #: parameters
    seconds: float | None
    memory: float | None  #: bytes at the peak
    deviation: float | None = None  #: of the metric over the arrangements within a run, and its worst: medians too
    worst: float | None = None
    best: bool = False
    pairs: int | None = None  #: seeds shared with the baseline; None: not compared
    difference: float | None = None  #: mean of this row minus the baseline, over the pairs
    p_value: float | None = None
    compared_to: Row | None = None  #: the baseline's row that these three are taken against

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
    clashes: int  #: of them, those whose setting of the same name kept other modules
    shared: str  #: ``key=value …`` of most runs, left out of the settings that have it; or empty

    @property
    def title(self) -> str:
        better = "lower" if self.lower_is_better else "higher"
        return f"{self.model} · {self.task} · {self.metric} ({better} is better)"

    @property
    def unsaid(self) -> str:
        """What a setting has that does not say otherwise, as a line, or empty."""
        return f"where a setting says nothing else: {self.shared}" if self.shared else ""


def cells(section: Section, baseline: str | None) -> tuple[list[str], list[list[str]]]:
    """Headers and rows as people read them; columns that would say nothing in this section are left out."""
    settings = any(row.setting for row in section.rows)
    ranges = any((row.low, row.high) != _range(row) for row in section.rows)
    parts = any(row.activated not in (None, row.trainable) for row in section.rows)
    arranged = any(row.worst is not None for row in section.rows)
    columns: dict[str, tuple[bool, Callable[[Row], str]]] = {
        "method": (True, lambda row: f"{row.method} {STAR}" if row.best else row.method),
        "setting": (settings, lambda row: row.setting),
        "n": (True, lambda row: str(len(row.values))),
        "median": (True, lambda row: number(row.median)),
        "interval": (True, lambda row: _span(row.low, row.high) if len(row.values) > 1 else NONE),
        "range": (ranges, lambda row: _span(*_range(row))),
        "std": (arranged, lambda row: _known(number, row.deviation)),
        "worst": (arranged, lambda row: _known(number, row.worst)),
        f"vs {(baseline or '').partition(' ')[0]}": (baseline is not None, _difference),
        "p (pairs)": (baseline is not None, _test),
        "trainable": (True, lambda row: _known(count, row.trainable)),
        "activated": (parts, lambda row: _known(count, row.activated)),
        "train time": (True, lambda row: _known(duration, row.seconds)),
        "memory": (True, lambda row: _known(size, row.memory)),
    }
    columns = {header: column for header, column in columns.items() if column[0]}
    return list(columns), [[show(row) for _, show in columns.values()] for row in section.rows]


def _range(row: Row) -> tuple[float, float]:
    return min(row.values.values()), max(row.values.values())


def _span(low: float, high: float) -> str:
    return f"{number(low)}–{number(high)}"


def _difference(row: Row) -> str:
    if row.difference is None:
        return NONE
    return f"{'+' if row.difference >= 0 else ''}{number(row.difference)}"


def _test(row: Row) -> str:
    if row.p_value is None:
        return NONE
    return f"{f'{row.p_value:.3f}' if row.p_value >= 0.001 else '<0.001'} ({row.pairs})"


def _known(show: Callable[[float], str], value: float | None) -> str:
    return NONE if value is None else show(value)


def notes(sections: Sequence[Section], baseline: str | None, unfinished: int, broken: Sequence[str]) -> list[str]:
    """Footnotes: what the columns mean and which runs are not in them, the ``broken`` ones with the reason."""
    rows = [row for section in sections for row in section.rows]
    repeated = any(len(row.values) > 1 for row in rows)
    lines = ["n counts seeds."]
    if repeated:
        lines[0] += (
            " interval: of the median, 95 % by order statistics from 6 seeds on; below, the range "
            "of the seeds, which covers the median with probability 1 - 2^(1-n): 75 % for 3 seeds, 94 % for 5."
        )
    if any(row.worst is not None for row in rows):
        lines.append(
            "A run with std and worst asked behind several arrangements of demonstrations: its metric is the mean over "
            "them, these are their standard deviation and the worst of them (medians over seeds)."
        )
    if baseline is not None:
        lines.append(
            f"vs {baseline}: mean difference over pairs of the same seed, two-sided p of the sign-flip test; "
            "n pairs cannot give p below 2^(1-n), so 0.05 needs 6."
        )
    starred = any(row.best for row in rows)
    rule = "the interval lies beyond every other row's, with at least 3 seeds in each"
    if repeated and any(len(section.rows) > 1 for section in sections):
        lines.append(f"{STAR} {rule}." if starred else f"No row is marked best: that needs that {rule}.")
    aside = {
        "not finished": unfinished,
        "without the metric": sum(section.without_metric for section in sections),
        "replaced by a newer run of the same seed": sum(section.repeats for section in sections),
    }
    if clashes := sum(section.clashes for section in sections):
        lines.append(
            f"{clashes} of the runs replaced below kept other modules under the same name: "
            "method.chosen_by=NAME tells settings apart."
        )
    left_out = ", ".join(f"{runs} {why}" for why, runs in aside.items() if runs)
    return [
        *lines,
        *([f"Left out: {left_out}."] if left_out else []),
        *(f"Left out as broken: {why}" for why in broken),
    ]


def terminal(
    sections: Sequence[Section], baseline: str | None, footnotes: Sequence[str], more: Sequence[RenderableType] = ()
) -> RenderableType:
    """The comparison for rich, best rows bold, and ``more`` tables above the footnotes."""
    tables = [_Fitted(section, baseline) for section in sections]
    return Group(*tables, *more, *(Trimmed(Text(note, style="dim")) for note in footnotes))


@dataclass
class _Fitted:
    """A section as one table; in a narrow terminal its costs stand in a second one below."""

    section: Section
    baseline: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.section.title, style="bold")
        if self.section.unsaid:
            yield Text(self.section.unsaid, style="dim")
        whole = self._table(without=())
        if console.measure(whole, options=options.update(width=1000)).maximum <= options.max_width:
            yield Trimmed(whole)
        else:
            yield Trimmed(self._table(without=COSTS))
            yield Text()
            headers, _ = cells(self.section, self.baseline)
            yield Trimmed(self._table(without=[name for name in headers if name not in (*LABELS, *COSTS)]))
        yield Text()

    def _table(self, without: Sequence[str]) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0))
        headers, lines = cells(self.section, self.baseline)
        shown = [i for i, header in enumerate(headers) if header not in without]
        for i in shown:
            justify: JustifyMethod = "left" if headers[i] in LABELS else "right"
            table.add_column(headers[i], justify=justify, overflow="fold", no_wrap=headers[i] != "setting")
        for row, line in zip(self.section.rows, lines, strict=True):
            add(table, *(Text(line[i], style="bold" if row.best else "") for i in shown))
        return table


def markdown(sections: Sequence[Section], baseline: str | None, footnotes: Sequence[str], more: str = "") -> str:
    """The same tables and footnotes as GitHub Markdown."""
    lines = []
    for section in sections:
        headers, table = cells(section, baseline)
        unsaid = [section.unsaid, ""] if section.unsaid else []
        lines += [f"### {section.title}", "", *unsaid, _line(headers), _line(["---"] * len(headers))]
        lines += [_line(line) for line in table]
        lines.append("")
    lines += [more] if more else []
    return "\n".join([*lines, *(f"- {note}" for note in footnotes), ""])


def _line(line: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"


def swept(rows: Sequence[Row]) -> tuple[str, dict[str, float]]:
    """The number that tells apart the rows of every method that has several, and its value in each by label.

    Other keys may go along with it, as alpha with rank; of several such numbers the one with the fewest values in all,
    then the last by name. Empty where there is none.
    """
    settings = {row.label: dict(part.split("=", 1) for part in SETTING.split(row.setting) if part) for row in rows}
    methods = [[row.label for row in rows if row.method == method] for method in {row.method: None for row in rows}]
    several = [labels for labels in methods if len(labels) > 1]
    keys = set.intersection(*(set(settings[label]) for labels in several for label in labels)) if several else set()
    found: dict[str, dict[str, float]] = {}
    for key in keys:
        with suppress(ValueError):
            values = {label: float(settings[label][key]) for label in settings if key in settings[label]}
            if all(len({values[label] for label in labels}) == len(labels) for labels in several):
                found[key] = values
    if not found:
        return "", {}
    fewest = min(len(set(values.values())) for values in found.values())
    chosen = max(key for key, values in found.items() if len(set(values.values())) == fewest)
    return chosen, found[chosen]


def curve(section: Section) -> dict[str, Any] | None:
    """Where one number tells the rows of methods apart: medians and their intervals over it, drawn as ``lines``.

    A method without it is a level line. None below three numbers.
    """
    key, numbers = swept(section.rows)
    columns = sorted(set(numbers.values()))
    if len(columns) < 3:
        return None
    found: dict[str, dict[float, Row]] = {}
    for row in section.rows:
        for column in [numbers[row.label]] if row.label in numbers else columns:
            found.setdefault(row.method, {})[column] = row
    seeds = sorted({len(row.values) for row in section.rows})
    counted = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    label = (
        f"{section.metric}, median and interval of {counted} seeds" if seeds[-1] > 1 else f"{section.metric}, 1 seed"
    )

    def grid(part: str) -> list[list[float | None]]:
        return [[getattr(line.get(column), part, None) for column in columns] for line in found.values()]

    return {
        "file": re.sub(r"[^\w.+-]+", "-", f"compare-{section.model}-{section.task}.png"),
        "kind": "lines",
        "title": f"{section.model} · {section.task}",
        "rows": list(found),
        "columns": columns,
        "values": grid("median"),
        **({"low": grid("low"), "high": grid("high")} if seeds[-1] > 1 else {}),
        "column_label": key,
        "label": label,
    }


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
                "shared": section.shared,
                "metric": section.metric,
                "lower_is_better": section.lower_is_better,
                "n": len(row.values),
                "median": row.median,
                "interval_low": row.low,
                "interval_high": row.high,
                "min": smallest,
                "max": largest,
                "std": row.deviation,
                "worst": row.worst,
                "best": row.best,
                "baseline": baseline,
                "pairs": row.pairs,
                "mean_difference": row.difference,
                "p_value": row.p_value,
                "trainable_parameters": row.trainable,
                "activated_parameters": row.activated,
                "train_seconds": row.seconds,
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
