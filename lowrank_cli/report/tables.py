"""Tables for the terminal, made from run folders alone: no method, model or task is known by name here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from lowrank_cli.errors import UserError, escaped
from lowrank_cli.report.metric_names import quality
from lowrank_cli.report.number_format import duration, jobs_of, number
from lowrank_cli.report.path_format import shown
from lowrank_cli.runs.process import is_gone
from lowrank_cli.schema import parse_overrides

if TYPE_CHECKING:
    from lowrank_cli.runs import Run

STATUS_STYLES = {
    "done": "green",
    "failed": "red",
    "interrupted": "yellow",
    "running": "cyan",
    "pending": "dim",
    "broken": "red",
}
NONE = "–"


def run_title(info: dict[str, Any]) -> str:
    """``train · lora · llama · tiny_yesno · seed 1``."""
    choices = info.get("choices", {})
    model = info.get("model") or choices.get("model")
    parts = [info.get("stage"), choices.get("method"), model, choices.get("task")]
    if info.get("seed") is not None:
        parts.append(f"seed {info['seed']}")
    return " · ".join(str(part) for part in parts if part)


def first_line(error: Any) -> str:
    """The line of an error that says what happened: a traceback's last, otherwise the first."""
    lines = [line for line in str(error or "").strip().splitlines() if line.strip()]
    if not lines:
        return NONE
    return lines[-1 if lines[0].startswith("Traceback") else 0].strip()


def runs_table(runs: Sequence[Run], broken: Mapping[Path, UserError], metric: str | None = None) -> RenderableType:
    """``lrk list runs``: one line a run in the order given, under the folder that runs stand in; broken ones last.

    ``result`` is ``metric``, or else the first of the run's metrics of quality.
    """
    if not (runs or broken):
        return Text("no runs yet; start one with: lrk train")
    columns = ["run", "stage", "status", "seed", "result", "time"]
    table = Fitted(None, columns, leave_out=["seed", "time", "stage"], gap=1, widest_result=24)
    folder = None
    rows = [(run.path, _cells(run, metric)) for run in runs]
    rows += [(path, _broken(why)) for path, why in broken.items()]
    for path, cells in rows:
        if path.parent != folder:
            folder = path.parent
            table.rows.append([Text(f"{shown(folder)}/", style="dim")])
        table.rows.append([f"  {path.name}", *cells])
    return table


def _cells(run: Run, metric: str | None) -> list[str | Text]:
    """A run's line: stage, status, seed, result and time."""
    seed = run.info.get("seed")
    try:
        return [
            _stage(run),
            status_text(run),
            NONE if seed is None else str(seed),
            _result(f"{metric} {number(run.metrics[metric])}" if metric else _outcome(run, 1), run),
            _seconds(run.info),
        ]
    except UserError as error:
        return _broken(error)


def _result(text: str, run: Run) -> str | Text:
    """A finished run's result, which stays on one line; another run's error."""
    return Text(text, no_wrap=True) if run.done else text


def _broken(error: UserError) -> list[str | Text]:
    return [NONE, Text("broken", style=STATUS_STYLES["broken"]), NONE, str(error).removeprefix("run: "), NONE]


def jobs_table(jobs: Sequence[Run], metrics: Sequence[str] | None = None) -> RenderableType:
    """A sweep: one line a job with the overrides that vary, status, metrics and time; errors stand below.

    ``metrics`` names the columns; without it the first two quality metrics of the finished jobs are shown.
    """
    settings = (parse_overrides(job.info.get("overrides", [])) for job in jobs)
    overrides = [{setting.key: setting.value for setting in own} for own in settings]
    keys = dict.fromkeys(key for row in overrides for key in row)
    varying = [key for key in keys if len({row.get(key) for row in overrides}) > 1]
    results = [job.metrics if job.done else {} for job in jobs]
    columns = metrics if metrics is not None else quality(name for row in results for name in row)[:2]
    unfinished = [job for job in jobs if not job.done]
    heading = jobs_of(len(jobs)) + (f", {len(unfinished)} not done" if unfinished else "")
    leave_out = [*reversed(varying), "time", *reversed(columns[1:])]  # a job's name says what varies
    table = Fitted(heading, ["job", *varying, "status", *columns, "time"], leave_out)
    for job, row, result in zip(jobs, overrides, results, strict=True):
        cells: list[str | Text] = [*(row.get(key, NONE) for key in varying), status_text(job)]
        cells += [number(result[name]) if name in result else NONE for name in columns]
        table.rows.append([job.path.name, *cells, _seconds(job.info)])
    errors = {job.path.name: first_line(job.info["error"]) for job in unfinished if job.info.get("error")}
    lines = (Text(f"{name}: {error}", style="red", overflow="ignore") for name, error in errors.items())
    return Group(table, *lines)


def stages_table(stages: Sequence[tuple[str, Run | None]], heading: str | None = None) -> RenderableType:
    """A recipe: its stages by name, each with its run, or None while it has not started."""
    table = Fitted(heading, ["stage", "verb", "status", "result", "time", "run"], leave_out=["time", "verb"])
    for name, run in stages:
        if run is None:
            table.rows.append([name, NONE, Text("waiting", style="dim"), NONE, NONE, NONE])
        else:
            cells = _stage(run), status_text(run), _outcome(run, 2), _seconds(run.info)
            table.rows.append([name, *cells, run.path.name])
    return table


@dataclass
class Trimmed:
    """What it holds, without the spaces that fill up its lines."""

    held: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self.held, options, pad=False):
            text = Text.assemble(*((part.text, part.style or "") for part in line), no_wrap=True, overflow="ignore")
            text.rstrip()
            yield text


def add(table: Table, *cells: str | Text) -> None:
    """Add a row of plain words: square brackets of an override or an error are no markup."""
    table.add_row(*(_plain(cell) for cell in cells))


def _plain(cell: str | Text) -> Text:
    """A cell as wide as it will be printed."""
    return cell if isinstance(cell, Text) else Text(escaped(cell))


@dataclass
class Fitted:
    """A bare table that folds no word.

    In a narrow terminal headings break after ``/`` and ``.``, then columns are left out, and the rest runs over.
    Print it with ``crop=False``. Only ``result`` is wrapped, between its words, unless its text says ``no_wrap``.
    """

    heading: str | None
    columns: Sequence[str]
    leave_out: Sequence[str]  #: columns that can go, the first goes first
    gap: int = 2  #: characters between columns
    widest_result: int = 48  #: characters
    rows: list[list[str | Text]] = field(default_factory=list)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.heading is not None:
            yield Text(self.heading, style="bold", no_wrap=True, overflow="ignore")
        ways = [(0, False), *((gone, True) for gone in range(len(self.leave_out) + 1))]
        for gone, broken in ways:
            table = self._table(self.leave_out[:gone], broken)
            needed = console.measure(table, options=options.update(width=10_000)).minimum
            if needed <= options.max_width:
                break
        yield from console.render(Trimmed(table), options.update(width=max(needed, options.max_width)))

    def _table(self, gone: Sequence[str], broken: bool) -> Table:
        table = Table(box=None, padding=(0, self.gap, 0, 0))
        shown = [i for i, column in enumerate(self.columns) if column not in gone]
        for column in (self.columns[i] for i in shown):
            justify: JustifyMethod = "right" if column in ("seed", "time") else "left"
            title = column.replace("/", "/\n").replace(".", ".\n") if broken else column
            table.add_column(Text(title), justify=justify, overflow="fold")
        for row in self.rows:
            add(table, *(row[i] for i in shown if i < len(row)))
        for i, made in zip(shown, table.columns, strict=True):
            cells = [row[i] for row in self.rows if i < len(row)]
            if self.columns[i] == "result":
                made.max_width = self.widest_result
                whole = [cell_len(cell.plain) for cell in cells if isinstance(cell, Text) and cell.no_wrap]
                made.min_width = min(made.max_width, max(whole, default=0))
            else:
                made.no_wrap = True
                heading = str(made.header).splitlines()
                made.min_width = max(map(cell_len, [*heading, *(str(_plain(cell)) for cell in cells)]))
        return table


def _stage(run: Run) -> str:
    return str(run.info.get("stage", NONE))


def status(run: Run) -> str:
    """As noted; a run whose process was killed could not note its end."""
    gone = is_gone(run.info.get("process"), run.path / "run.json")
    return "interrupted" if gone else str(run.info.get("status", NONE))


def status_text(run: Run) -> Text:
    """:func:`status`, coloured."""
    word = status(run)
    return Text(word, style=STATUS_STYLES.get(word, ""))


def _outcome(run: Run, metrics: int) -> str:
    """The first ``metrics`` quality metrics of a finished run, or the error of another."""
    if not run.done:
        return first_line(run.info.get("error"))
    values = run.metrics
    return ", ".join(f"{name} {number(values[name])}" for name in quality(values)[:metrics]) or NONE


def _seconds(info: dict[str, Any]) -> str:
    return duration(info["seconds"]) if info.get("seconds") is not None else NONE
