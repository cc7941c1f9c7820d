"""The plan of a study: what it will run, counted, and how long that takes by a few steps of each arm."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from lowrank_cli.config.composition import Composed
from lowrank_cli.errors import UserError
from lowrank_cli.launch import stage
from lowrank_cli.launch.study_plan import Cell, Job, Plan
from lowrank_cli.launch.tuning import trials
from lowrank_cli.launch.workers import Workers
from lowrank_cli.report import number_format, tables
from lowrank_cli.runs import Run, progress
from lowrank_cli.terminal import Terminal

STEPS = 4  #: of a probe
FEW = (f"train.max_steps={STEPS}", f"train.eval_every={STEPS // 2}", "train.log_every=1", "train.checkpoint_every=0")


def print_plan(composed: Composed, config_dir: str | None, probe: bool) -> None:
    """What is compared, how it is tuned, how many runs that makes and, by a short probe, how long they take."""
    config = composed.config
    study, plan = config.study, Plan(config.study)
    number = counts(plan)
    rows = [
        ("arms", ", ".join(f"{arm} (the baseline)" if arm == study.baseline else arm for arm in study.arms)),
        *((f"tasks of {group}" if study.groups else "tasks", ", ".join(plan.tasks(group))) for group in plan.groups),
        ("seeds", ", ".join(map(str, study.seeds))),
        *((f"tuning of {group}" if study.groups else "tuning", _tuning(plan, group)) for group in plan.groups),
        ("runs", f"{number.prepared + number.tuning + number.final}: {_phases(number)}"),
    ]  # fmt: skip
    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for key, text in filter(lambda row: row[1], rows):
        tables.add(grid, key, text)
    terminal = Terminal()
    terminal.print(Text(study.name, style="bold"))
    terminal.print(tables.Trimmed(grid))
    if probe:
        seconds = estimate(plan, config.workers, config_dir)
        conditions = f"with workers={config.workers}, on this machine as busy as it is now"
        without = ", and what is prepared" if number.prepared else ""
        known = seconds is not None and f"about {number_format.duration(seconds)}{without}, {conditions}"
        terminal.print(f"time: {known or 'unknown, as the baseline trains no steps that could be tried first'}")
    terminal.print("nothing was started", style="dim")


def _phases(number: Counts) -> str:
    phases = {"of preparation": number.prepared, "of tuning": number.tuning, "of the comparison": number.final}
    return ", ".join(f"{runs} {phase}" for phase, runs in phases.items() if runs)


def _tuning(plan: Plan, group: str) -> str:
    """How a group is tuned; empty where it is not."""
    tune = plan.tune(group)
    if tune is None:
        return ""
    search = ", ".join(f"{key} over {_span(values)}" for key, values in tune.search.items())
    tried = "each value" if tune.sampler == "grid" else f"{tune.budget} trials by {tune.sampler}"
    where = f" on {tune.task}" if tune.task else " on each task"
    widened = f", up to {tune.widen} more beyond an edge" if tune.widen else ""
    return f"{search}: {tried}{where}{widened}; chosen by {tune.metric}, seeds {', '.join(map(str, tune.seeds))}"


def _span(values: Any) -> str:
    if isinstance(values, dict):
        return f"{values['low']} to {values['high']}{' (log)' if values.get('log') else ''}"
    return ", ".join(map(str, values))


@dataclass(frozen=True)
class Counts:
    """Runs of a study by phase."""

    prepared: int
    tuning: int
    final: int


def counts(plan: Plan) -> Counts:
    """Without the values that widening may add."""
    seeds, cells = plan.config.seeds, list(plan.cells())
    prepared = sum(len(plan.steps(group)) * len(plan.seeds(group)) for group in plan.groups)
    return Counts(prepared, sum(tuning_runs(plan, cell) for cell in cells), len(cells) * len(seeds))


def tuning_runs(plan: Plan, cell: Cell) -> int:
    """Runs that tune a cell; none where another decides for it."""
    tune = plan.tune(cell.group)
    if tune is None or plan.tuned_as(cell) != cell or not (keys := plan.searched(cell)):
        return 0
    return trials(tune, keys) * len(tune.seeds)


def estimate(plan: Plan, workers: int, config_dir: str | None) -> float | None:
    """Seconds that tuning and comparing take; None where no probe can say.

    In each group the baseline takes a few steps on every task, and every arm does on the first; the other cells follow
    from the ratios. Arms that read a prepared run, or train no steps, are taken to cost as much as the baseline. What
    a method does in between, such as scoring, is not seen.
    """
    config = plan.config
    with tempfile.TemporaryDirectory(prefix="lrk-probe-") as folder:
        probes = {}
        for cell in plan.cells():
            first_task = next(iter(plan.tasks(cell.group)))
            if cell.arm == config.baseline or cell.task == first_task:
                job = _probe(plan, cell)
                if job is not None:
                    composed = stage.check(job.verb, list(job.overrides), config_dir)
                    probes[cell] = stage.create(composed, config_dir, "probe", Path(folder) / str(cell))
        full = {cell: _full(plan, cell, config_dir) for cell in probes}
        with progress.bar("timing a few steps of each arm", len(probes), shown=True) as bar:
            workers_of_probes = Workers(workers, Path(folder) / ".devices")
            workers_of_probes.run([run.path for run in probes.values()], lambda _: None, lambda _: bar.advance())
        known = {
            cell: seconds for cell, run in probes.items() if (seconds := _seconds(run.path, full[cell])) is not None
        }
    return _total(plan, known, workers)


def _probe(plan: Plan, cell: Cell) -> Job | None:
    """A few steps of a cell; None for one that trains none or reads what is not there yet."""
    job = plan.example(cell)
    reads = any(f"{{{name}}}" in word for word in job.overrides for name in plan.steps(cell.group))
    if job.verb != "train" or reads:
        return None
    return Job(str(cell), job.verb, (*job.overrides, *FEW), cell)


def _full(plan: Plan, cell: Cell, config_dir: str | None) -> Composed:
    job = plan.example(cell)
    return stage.check(job.verb, list(job.overrides), config_dir)


def _seconds(folder: Path, composed: Composed) -> float | None:
    """How long a whole run takes, from the folder of its probe."""
    run = Run.open(folder)
    if not run.done:
        raise UserError(f"study: a probe failed: {run.info.get('error')}")
    rows = [row for row in run.history() if "train/seconds" in row]
    if len(rows) < STEPS or not run.metrics.get("train/epochs"):
        return None
    took = [after["train/seconds"] - before["train/seconds"] for before, after in pairwise(rows)]
    step = median(took)
    evaluation = max(took[STEPS // 2 - 1] - step, 0)  # between the steps around it
    train = composed.config.train
    steps = math.ceil(train.epochs * run.metrics["train/steps"] / run.metrics["train/epochs"])
    steps = min(steps, train.max_steps or steps)
    fixed = run.info["seconds"] - run.metrics["train/seconds"]  # loading, the last evaluations, plots
    return fixed + steps * step + max(math.ceil(steps / train.eval_every) - 1, 0) * evaluation


def _total(plan: Plan, known: dict[Cell, float], workers: int) -> float | None:
    """Over all runs of tuning and of the comparison."""

    def seconds(cell: Cell) -> float | None:
        first_task = next(iter(plan.tasks(cell.group)))
        base = known.get(Cell(cell.group, cell.task, plan.config.baseline))
        start, own = (known.get(Cell(cell.group, first_task, arm)) for arm in (plan.config.baseline, cell.arm))
        if base is None or start is None:
            return None
        return base * (own / start if own is not None else 1)

    def every() -> Iterator[float | None]:
        for cell in plan.cells():
            each, runs = seconds(cell), len(plan.config.seeds) + tuning_runs(plan, cell)
            yield None if each is None else each * runs

    times = list(every())
    return None if None in times else math.fsum(time for time in times if time is not None) / workers
