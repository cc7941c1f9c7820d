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
from lowrank_cli.launch.pool import LOCKS
from lowrank_cli.launch.study_plan import Cell, Job, Plan
from lowrank_cli.launch.tuning import rungs, trials
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
    for warning in _uneven(plan):
        terminal.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if probe:
        least, most = estimate(plan, config.workers, config_dir) or (None, None)
        time = "unknown, as the baseline trains no steps that could be tried first"
        if least is not None and most is not None:
            widened = f", up to {number_format.duration(most)} if every search is widened" if most > least else ""
            without = ", without what is prepared" if number.prepared else ""
            conditions = f"with workers={config.workers}, on this machine as busy as it is now"
            time = f"about {number_format.duration(least)}{widened}{without}; {conditions}"
        terminal.print(f"time: {time}", soft_wrap=True)
    terminal.print("nothing was started", style="dim")


def _phases(number: Counts) -> str:
    widened = f" (up to {number.widened} more where a search is widened)" if number.widened else ""
    phases = {
        "of preparation": number.prepared,
        f"of tuning{widened}": number.tuning,
        "of the comparison": number.final,
    }
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
    steps = [f"{size} for {_share(part)}" for size, part in rungs(trials(tune, list(tune.search)), tune.halving)]
    halving = f", {', then '.join(steps)}" if len(steps) > 1 else ""
    seeds = ", ".join(map(str, tune.seeds))
    return f"{search}: {tried}{where}{widened}{halving}; chosen by {tune.metric}, seeds {seeds}"


def _share(part: int) -> str:
    return "all steps" if part == 1 else f"1/{part} of the steps"


def _uneven(plan: Plan) -> Iterator[str]:
    """Where arms have different numbers of trials: one that knows fewer of a grid's keys has fewer."""
    for group in plan.groups:
        tune = plan.tune(group)
        cells = [cell for cell in plan.cells() if cell.group == group]
        counted = {cell.arm: trials(tune, keys) if (keys := plan.searched(cell)) else 0 for cell in cells if tune}
        if len({*counted.values()}) > 1:
            listed = ", ".join(f"{arm} {count}" for arm, count in counted.items())
            where = f" of {group}" if plan.config.groups else ""
            yield f"the arms{where} have different numbers of trials, by the searched keys that they know: {listed}"


def _span(values: Any) -> str:
    if isinstance(values, dict):
        return f"{values['low']} to {values['high']}{' (log)' if values.get('log') else ''}"
    return ", ".join(map(str, values))


@dataclass(frozen=True)
class Counts:
    """Runs of a study by phase."""

    prepared: int
    tuning: int
    widened: int  #: that widening may add to those of tuning
    final: int


@dataclass(frozen=True)
class Cost:
    """Seconds that a run takes: besides its steps, and for all of them."""

    fixed: float
    steps: float

    def of(self, part: int = 1) -> float:
        """The seconds of a run of ``1 / part`` of the steps."""
        return self.fixed + self.steps / part

    def times(self, ratio: float) -> Cost:
        return Cost(self.fixed * ratio, self.steps * ratio)


def counts(plan: Plan) -> Counts:
    seeds, cells = plan.config.seeds, list(plan.cells())
    prepared = sum(len(plan.steps(group)) * len(plan.seeds(group)) for group in plan.groups)
    tuning = sum(runs for cell in cells for runs, _ in tuning_runs(plan, cell))
    return Counts(prepared, tuning, sum(_widened(plan, cell) for cell in cells), len(cells) * len(seeds))


def tuning_runs(plan: Plan, cell: Cell) -> list[tuple[int, int]]:
    """Runs that tune a cell, without widening, and the part of the steps (1 / part) that they train for.

    Empty where another cell decides for it.
    """
    tune = plan.tune(cell.group)
    if tune is None or plan.tuned_as(cell) != cell or not (keys := plan.searched(cell)):
        return []
    return [(size * len(tune.seeds), part) for size, part in rungs(trials(tune, keys), tune.halving)]


def _widened(plan: Plan, cell: Cell) -> int:
    tune = plan.tune(cell.group)
    return tune.widen * len(tune.seeds) if tune and tuning_runs(plan, cell) else 0


def estimate(plan: Plan, workers: int, config_dir: str | None) -> tuple[float, float] | None:
    """Seconds that tuning and comparing take, without and with all widening; None where no probe can say.

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
            workers_of_probes = Workers(workers, Path(folder) / LOCKS)
            workers_of_probes.run([run.path for run in probes.values()], lambda _: None, lambda _: bar.advance())
        known = {cell: cost for cell, run in probes.items() if (cost := _cost(run.path, full[cell])) is not None}
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


def _cost(folder: Path, composed: Composed) -> Cost | None:
    """What a whole run takes, from the folder of its probe."""
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
    return Cost(fixed, steps * step + max(math.ceil(steps / train.eval_every) - 1, 0) * evaluation)


def _total(plan: Plan, known: dict[Cell, Cost], workers: int) -> tuple[float, float] | None:
    """Over all runs of tuning and of the comparison; see :func:`estimate`."""
    least = more = 0.0
    for cell in plan.cells():
        first_task = next(iter(plan.tasks(cell.group)))
        base = known.get(Cell(cell.group, cell.task, plan.config.baseline))
        start, own = (known.get(Cell(cell.group, first_task, arm)) for arm in (plan.config.baseline, cell.arm))
        if base is None or start is None:
            return None
        cost = base.times(own.of() / start.of()) if own is not None else base
        runs = [(len(plan.config.seeds), 1), *tuning_runs(plan, cell)]
        least += sum(count * cost.of(part) for count, part in runs)
        more += _widened(plan, cell) * cost.of()
    return least / workers, (least + more) / workers
