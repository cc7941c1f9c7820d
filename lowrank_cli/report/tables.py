"""Tables for the terminal, made from run folders alone: no method, model or task is known by name here."""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lowrank_cli.errors import UserError, escaped
from lowrank_cli.report import export_hints
from lowrank_cli.runs.process import is_gone
from lowrank_cli.runs.scores import SavedScores
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
SETTING = "setting.yaml"  #: which modules a pruning kept
_COSTS = ("seconds", "tokens_per_second", "parameters", "bytes", "steps", "epochs", "_step", "examples")


def count(value: float) -> str:
    """A number of things with three digits: ``262144`` → ``262k``, ``3600000`` → ``3.6M``."""
    return "".join(_scaled(value, 1000, ("", "k", "M", "B", "T")))


def size(value: float) -> str:
    """Bytes with three digits: ``641728512`` → ``612 MiB``."""
    return " ".join(_scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB")))


def _scaled(value: float, base: int, units: Sequence[str]) -> tuple[str, str]:
    unit = 0
    while abs(round(value)) >= base and unit + 1 < len(units):
        value, unit = value / base, unit + 1
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}", units[unit]


def duration(seconds: float) -> str:
    """Time in the two largest units: ``0.42s``, ``12.3s``, ``1m 52s``, ``2h 05m``, ``3d 04h``."""
    if seconds < 59.95:
        return f"{seconds:.2f}s" if seconds < 9.995 else f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours}h {minutes:02d}m"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days}d {hours:02d}h"


def jobs_of(number_of_jobs: int) -> str:
    """``1 job``, ``2 jobs``."""
    return f"{number_of_jobs} job{'s' * (number_of_jobs != 1)}"


def number(value: Any) -> str:
    """A metric's value: four decimals below 10, two above, three digits where it is tiny."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def is_cost(metric: str) -> bool:
    """Whether a metric counts time, memory, parameters, steps or examples, which say nothing of quality."""
    return metric.endswith(_COSTS)


def quality(metrics: dict[str, Any]) -> list[str]:
    """Names of the metrics that say how good a model is: test before dev, losses last in each."""
    named = [name for name in metrics if name.startswith(("test/", "dev/")) and not is_cost(name)]
    return sorted(named, key=lambda name: (name.startswith("dev/"), name.endswith("loss")))


def shown(path: str | os.PathLike[str]) -> str:
    """A path as a person at this directory would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def typed(path: str | os.PathLike[str]) -> str:
    """:func:`shown`, quoted where a shell needs it."""
    return shlex.quote(shown(path))


def end_of_run(run: Run, selective: str = "") -> RenderableType:
    """What a run learned, what it cost, where its folder is and what to do next.

    ``selective`` is the method that trains the modules of a ``setting.yaml``.
    """
    info = run.info
    metrics = run.metrics if run.done else {}
    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    if not run.done:
        add(grid, "status", _status(run))
        if info.get("error"):
            add(grid, "error", first_line(info["error"]))
    rows: list[tuple[str, str | Text]] = [
        *_learned(metrics),
        *_asked(run),
        *_cost(info, metrics),
        *_others(info, metrics),
    ]
    for name, text in rows:
        add(grid, name, text)
    contents = ("adapter/", SETTING, "export/", "scores.json", "predictions.jsonl", "plots/", "checkpoints/")
    held = [name for name in contents if (run.path / name).exists()]
    if held:
        add(grid, "holds", ", ".join(held))
    border = STATUS_STYLES.get(info.get("status", ""), "none")
    panel = Panel.fit(grid, title=Text(run_title(info)), border_style=border)
    arranged = "arrangements.json"
    ways = run.read_json(arranged) if run.done and (run.path / arranged).is_file() else []
    folder = _whole(f"  folder: {shown(run.path)}")
    table = [spread_table(ways)] if len(ways) > 1 else []
    return Group(
        panel, *table, folder, *(_whole(f"  {way}") for way in export_hints.ways(run)), *next_steps(run, selective)
    )


def spread_table(arrangements: Sequence[dict[str, Any]]) -> RenderableType:
    """Mean, sample standard deviation and worst case over arrangements of demonstrations: all, and by what varies."""
    varied = ("draw", "permutation", "template")
    metric = next(key for key in arrangements[0] if key not in (*varied, "demonstrations"))
    groups = {"all": list(arrangements)}
    for key in varied:
        groups[f"{key}s"] = [row for row in arrangements if not any(row[other] for other in varied if other != key)]
    table = Fitted(f"{metric} over demonstrations", ["", "n", "mean", "std", "worst"], leave_out=[])
    for name, rows in groups.items():
        values = [row[metric] for row in rows]
        if len(values) > 1:
            figures = [number(figure) for figure in (fmean(values), stdev(values), min(values))]
            table.rows.append([name, str(len(values)), *figures])
    return table


def next_steps(run: Run, selective: str = "") -> list[Text]:
    """What to type after a run or a recipe; ``selective`` as in :func:`end_of_run`."""
    return [_whole(f"  next: {command}") for command in _next(run, selective)]


def end_of_sweep(folder: Path, jobs: Sequence[Run]) -> RenderableType:
    """The jobs, where they lie, and what to do next; an error says how to continue those that are not done."""
    compare = [_whole(f"  next: lrk compare {typed(folder)}")] if all(job.done for job in jobs) else []
    return Group(jobs_table(jobs), _whole(f"  folder: {shown(folder)}"), *compare)


def _whole(line: str) -> Text:
    return Text(line, no_wrap=True, overflow="ignore")


def run_title(info: dict[str, Any]) -> str:
    """``train · lora · llama · tiny_yesno · seed 1``."""
    choices = info.get("choices", {})
    model = info.get("model") or choices.get("model")
    parts = [info.get("stage"), choices.get("method"), model, choices.get("task")]
    if info.get("seed") is not None:
        parts.append(f"seed {info['seed']}")
    return " · ".join(str(part) for part in parts if part)


def _learned(metrics: dict[str, Any]) -> Iterable[tuple[str, Text]]:
    for name in quality(metrics):
        split, _, what = name.partition("/")
        part, _, metric = what.rpartition("/")  # of a mix: the task that it is measured on
        text = Text(number(metrics[name]), style="bold" if split == "test" else "")
        if name == "dev/loss" and "best_step" in metrics:
            text.append(f"  (best at step {metrics['best_step']} of {metrics.get('train/steps', '?')})")
        elif f"{split}/examples" in metrics and not part:
            text.append(f"  ({metrics[f'{split}/examples']} examples)")
        yield " ".join(filter(None, (split, part, metric.replace("_", " ")))), text


def _asked(run: Run) -> list[tuple[str, str]]:
    """How answers were asked for, where not plainly."""
    asked = run.config().get("evaluate", {}) if run.done else {}
    plain = {"shots": 0, "num_beams": 1}
    return [(key.removeprefix("num_"), str(asked[key])) for key in plain if asked.get(key, plain[key]) != plain[key]]


def _cost(info: dict[str, Any], metrics: dict[str, Any]) -> Iterable[tuple[str, str]]:
    total = metrics.get("total_parameters")
    for name in ("trainable", "activated"):
        value = metrics.get(f"{name}_parameters")
        if value is not None:
            share = f"  ({100 * value / total:.3g} % of {count(total)})" if total else ""
            yield f"{name} parameters", count(value) + share
    stage, whole = info.get("stage"), info.get("seconds")
    seconds = metrics.get(f"{stage}/seconds")
    if seconds is not None:
        rate = metrics.get(f"{stage}/tokens_per_second")
        yield f"{stage} time", duration(seconds) + (f"  ({count(rate)} tokens/s)" if rate else "")
    if whole is not None:
        yield "time from start to end" if seconds is not None else "time", duration(whole)
    if info.get("peak_memory_bytes"):
        yield "peak memory", size(info["peak_memory_bytes"])
    if info.get("device_memory_bytes"):
        yield "GPU memory", size(info["device_memory_bytes"])


def _others(info: dict[str, Any], metrics: dict[str, Any]) -> Iterable[tuple[str, str]]:
    elsewhere = {*quality(metrics), *(name for name in metrics if name.startswith("bench/"))}
    rest = [name for name in metrics if name not in elsewhere and not is_cost(name)]
    own = f"{info.get('stage')}/"
    names = (name.removeprefix(own).replace("_", " ") if name.startswith(own) else name for name in rest)
    return [(shown, number(metrics[name])) for shown, name in zip(names, rest, strict=True)]


def _next(run: Run, selective: str) -> Iterable[str]:
    stage, status, where = run.info.get("stage"), run.info.get("status"), typed(run.path)
    if status in ("failed", "interrupted"):
        return [f"lrk {stage} --resume {where}"]
    if status == "done" and selective and (run.path / SETTING).is_file():
        used, model = run.config("model")["model"], run.info["choices"]["model"]
        given = [f"model.{key}={typed(Path(used[key]))}" for key in ("path", "gguf") if used.get(key)]
        if not given and used.get("id") and used.get("name") != model:
            given = [f"model.id={used['id']}"]
        model = " ".join([f"model={model}", *given])
        return [f"lrk train method={selective} method.setting={typed(run.path / SETTING)} {model}"]
    if status == "done" and stage in ("train", "prune"):
        return [f"lrk evaluate run={where}"]
    if status == "done" and stage == "score":
        if run.config("score")["score"].get("level") != "module":
            return [f"lrk prune run={where} prune.drop={max(1, round(run.metrics['score/ranks'] / 8))}"]
        of_layer = Counter(entry["layer"] for entry in SavedScores.read(run.path).modules)
        keep = min(2, min(of_layer.values()) - 1)
        return [f"lrk prune run={where} prune.keep={keep}"] if keep else []
    if status == "done" and stage in ("run", "study"):
        return [f"lrk compare {where}"] if stage == "run" else []
    return (
        [f"lrk compare {typed(run.path.parent)}"]
        if status == "done" and stage not in ("export", "bench", "generate")
        else []
    )


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
            _status(run),
            NONE if seed is None else str(seed),
            f"{metric} {number(run.metrics[metric])}" if metric else _outcome(run, 1),
            _seconds(run.info),
        ]
    except UserError as error:
        return _broken(error)


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
    columns = metrics if metrics is not None else quality({name: None for row in results for name in row})[:2]
    unfinished = [job for job in jobs if not job.done]
    heading = jobs_of(len(jobs)) + (f", {len(unfinished)} not done" if unfinished else "")
    leave_out = [*reversed(varying), "time", *reversed(columns[1:])]  # a job's name says what varies
    table = Fitted(heading, ["job", *varying, "status", *columns, "time"], leave_out)
    for job, row, result in zip(jobs, overrides, results, strict=True):
        cells: list[str | Text] = [*(row.get(key, NONE) for key in varying), _status(job)]
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
            cells = _stage(run), _status(run), _outcome(run, 2), _seconds(run.info)
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
    Print it with ``crop=False``. Only ``result`` is wrapped, between its words.
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
            if self.columns[i] == "result":
                made.max_width = self.widest_result
            else:
                made.no_wrap = True
                heading = str(made.header).splitlines()
                cells = [*heading, *(str(_plain(row[i])) for row in self.rows if i < len(row))]
                made.min_width = max(map(cell_len, cells))
        return table


def _stage(run: Run) -> str:
    return str(run.info.get("stage", NONE))


def status(run: Run) -> str:
    """As noted; a run whose process was killed could not note its end."""
    gone = is_gone(run.info.get("process"), run.path / "run.json")
    return "interrupted" if gone else str(run.info.get("status", NONE))


def _status(run: Run) -> Text:
    shown = status(run)
    return Text(shown, style=STATUS_STYLES.get(shown, ""))


def _outcome(run: Run, metrics: int) -> str:
    """The first ``metrics`` quality metrics of a finished run, or the error of another."""
    if not run.done:
        return first_line(run.info.get("error"))
    values = run.metrics
    return ", ".join(f"{name} {number(values[name])}" for name in quality(values)[:metrics]) or NONE


def _seconds(info: dict[str, Any]) -> str:
    return duration(info["seconds"]) if info.get("seconds") is not None else NONE
