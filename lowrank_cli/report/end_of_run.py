"""What is printed when a run, a recipe or a sweep ends: results, cost, where its folder is, and what to do next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lowrank_cli.report import export_hints
from lowrank_cli.report.metric_names import STANDARD_ERROR, is_cost, quality
from lowrank_cli.report.number_format import count, duration, number, size
from lowrank_cli.report.path_format import shown, typed
from lowrank_cli.report.selections import SETTING
from lowrank_cli.report.tables import (
    STATUS_STYLES,
    Fitted,
    add,
    first_line,
    jobs_table,
    run_title,
    status_text,
)
from lowrank_cli.runs.scores import SavedScores
from lowrank_cli.schema import ENDLESS

if TYPE_CHECKING:
    from lowrank_cli.runs import Run

#: In ``arrangements.json``: bounds found with the labels of the test set, and what their rows are called.
ORACLES = {"oracle_all_sets": "oracle: one offset", "oracle_each_set": "oracle: an offset each"}
VARIED = ("draw", "permutation", "template")


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
        add(grid, "status", status_text(run))
        if info.get("error"):
            add(grid, "error", first_line(info["error"]))
    arranged = "arrangements.json"
    ways = run.read_json(arranged) if run.done and (run.path / arranged).is_file() else []
    in_table = tuple(f"test/{metric}_" for metric in _measured(ways)[:1]) if len(ways) > 1 else ()
    rows: list[tuple[str, str | Text]] = [
        *_learned({name: value for name, value in metrics.items() if not name.startswith(in_table)}),
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
    folder = _whole(f"  folder: {shown(run.path)}")
    table = [spread_table(ways)] if len(ways) > 1 else []
    return Group(
        panel, *table, folder, *(_whole(f"  {way}") for way in export_hints.ways(run)), *next_steps(run, selective)
    )


def spread_table(arrangements: Sequence[dict[str, Any]]) -> RenderableType:
    """Mean, sample standard deviation and worst case over arrangements of demonstrations: all, and by what varies.

    Then all by the other calibrations and by the bounds of an oracle.
    """
    metric, *others = _measured(arrangements)
    groups = {"all": list(arrangements)}
    for key in VARIED:
        groups[f"{key}s"] = [row for row in arrangements if not any(row[other] for other in VARIED if other != key)]
    table = Fitted(f"{metric} over demonstrations", ["", "n", "mean", "std", "worst"], leave_out=[])
    groups_of = [(name, metric, rows) for name, rows in groups.items()]
    groups_of += [(ORACLES.get(key, key), key, groups["all"]) for key in sorted(others, key=lambda key: key in ORACLES)]
    for name, key, rows in groups_of:
        values = [row[key] for row in rows]
        if len(values) > 1:
            figures = [number(figure) for figure in (fmean(values), stdev(values), min(values))]
            table.rows.append([name, str(len(values)), *figures])
    return table


def _measured(arrangements: Sequence[dict[str, Any]]) -> list[str]:
    """The metric that every arrangement was measured by, then that by other calibrations and oracles."""
    return [key for key in arrangements[0] if key not in (*VARIED, "demonstrations")] if arrangements else []


def next_steps(run: Run, selective: str = "") -> list[Text]:
    """What to type after a run or a recipe; ``selective`` as in :func:`end_of_run`."""
    return [_whole(f"  next: {command}") for command in _next(run, selective)]


def end_of_sweep(folder: Path, jobs: Sequence[Run]) -> RenderableType:
    """The jobs, where they lie, and what to do next; an error says how to continue those that are not done."""
    compare = [_whole(f"  next: lrk compare {typed(folder)}")] if all(job.done for job in jobs) else []
    return Group(jobs_table(jobs), _whole(f"  folder: {shown(folder)}"), *compare)


def _whole(line: str) -> Text:
    return Text(line, no_wrap=True, overflow="ignore")


def _learned(metrics: dict[str, Any]) -> Iterable[tuple[str, Text]]:
    for name in quality(metrics):
        split, _, what = name.partition("/")
        part, _, metric = what.rpartition("/")  # of a mix: the task that it is measured on
        text = Text(number(metrics[name]), style="bold" if split == "test" else "")
        if name == "dev/loss" and "best_step" in metrics:
            text.append(f"  (best at step {metrics['best_step']} of {metrics.get('train/steps', '?')})")
        elif f"{name}{STANDARD_ERROR}" in metrics:
            text.append(f"  (± {number(metrics[f'{name}{STANDARD_ERROR}'])})")
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
        rate, padding = metrics.get(f"{stage}/tokens_per_second"), metrics.get(f"{stage}/padding")
        speed = [f"{count(rate)} tokens/s"] if rate else []
        speed += [f"{padding:.0%} of batches is padding"] if padding else []
        yield f"{stage} time", duration(seconds) + (f"  ({', '.join(speed)})" if speed else "")
    if whole is not None:
        yield "time from start to end" if seconds is not None else "time", duration(whole)
    if info.get("peak_memory_bytes"):
        yield "peak memory", size(info["peak_memory_bytes"])
    if info.get("device_memory_bytes"):
        yield "GPU memory", size(info["device_memory_bytes"])


def _others(info: dict[str, Any], metrics: dict[str, Any]) -> Iterable[tuple[str, str]]:
    elsewhere = {*quality(metrics), *(name for name in metrics if name.startswith("bench/"))}
    rest = [
        name for name in metrics if name not in elsewhere and not is_cost(name) and not name.endswith(STANDARD_ERROR)
    ]
    own = f"{info.get('stage')}/"
    names = (name.removeprefix(own).replace("_", " ") if name.startswith(own) else name for name in rest)
    return [(shown, number(metrics[name])) for shown, name in zip(names, rest, strict=True)]


def _next(run: Run, selective: str) -> Iterable[str]:
    stage, status, where = run.info.get("stage"), run.info.get("status"), typed(run.path)
    if status in ("failed", "interrupted") and stage not in ENDLESS:
        return [f"lrk {stage} --resume {where}"]
    if status == "done" and selective and (run.path / SETTING).is_file():
        used, model = run.config("model")["model"], run.info["choices"]["model"]
        given = [f"model.{key}={typed(Path(used[key]))}" for key in ("path", "gguf") if used.get(key)]
        if not given and used.get("id") and used.get("name") != model:
            given = [f"model.id={used['id']}"]
        model = " ".join([f"model={model}", *given])
        return [f"lrk train method={selective} method.setting={typed(run.path / SETTING)} {model}"]
    if status == "done" and stage in ("train", "import", "prune"):
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
        if status == "done" and stage not in ("export", "bench", "generate", "serve")
        else []
    )
