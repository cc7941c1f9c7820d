"""What a setting keeps, and what a recipe learned with it: tables made from run folders alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from lowrank_cli.reader import read_yaml
from lowrank_cli.report import number_format, tables
from lowrank_cli.report.metric_names import quality
from lowrank_cli.runs import Run
from lowrank_cli.runs.records import Layers

SETTING = "setting.yaml"  #: which modules a pruning kept


def shown(run: Run) -> list[RenderableType]:
    """The modules that a run kept, by layer; nothing for a run without a setting."""
    file = run.path / SETTING
    if not run.done or not file.is_file():
        return []
    setting = read_yaml(file, Layers)
    layers = setting["layers"]
    kept, scored = (sum(map(len, of.values())) for of in (layers, setting["scores"]))
    heading = Text(f"kept {kept} of {scored} modules ({setting['name']})", style="bold")
    listed = [f"{layer}: {' '.join(roles) or tables.NONE}" for layer, roles in layers.items()]
    return [heading, Text("  " + "   ".join(listed))]


def learned(stages: Sequence[tuple[str, Run | None]]) -> list[RenderableType]:
    """The tasks that several methods were measured on, a column for each method; nothing where there are none.

    A method's second stage on a task has a column of its own, with the stage's name.
    """
    cells: dict[str, dict[str, Run]] = {}
    for name, run in stages:
        if run is not None and run.done and run.info["stage"] in ("train", "evaluate") and _metric(run):
            of_task, method = cells.setdefault(run.info["choices"]["task"], {}), run.info["choices"]["method"]
            of_task[f"{method} ({name})" if method in of_task else method] = run
    cells = {task: by_method for task, by_method in cells.items() if len(by_method) > 1}
    if not cells:
        return []
    methods = list(dict.fromkeys(method for by_method in cells.values() for method in by_method))
    table = tables.Fitted("what was learned", ["task", "metric", *methods], leave_out=[])
    for task, by_method in cells.items():
        metric = _metric(next(iter(by_method.values())))
        values = [by_method[method].metrics.get(metric) if method in by_method else None for method in methods]
        table.rows.append(
            [task, metric, *(tables.NONE if value is None else number_format.number(value) for value in values)]
        )
    sizes = [max((_size(of[method]) for of in cells.values() if method in of), default=0) for method in methods]
    if any(sizes):
        words = [number_format.count(size) if size else tables.NONE for size in sizes]
        table.rows.append(["trainable parameters", "", *words])
    return [table]


def _metric(run: Run) -> str:
    return next((name for name in quality(run.metrics) if name.startswith("test/")), "")


def _size(run: Run) -> int:
    return int(run.metrics.get("trainable_parameters", 0))
