"""A study: arms tuned with the same budget, then compared on tasks over seeds.

``outputs/<date>/<time>-study-<name>/`` is itself a run folder. In it lie ``study.json`` (what is compared),
``tuning.json`` (every trial and what was chosen) and the run folders: ``prepared/GROUP/STEP/SEED``,
``tuning/GROUP/TASK/ARM/VALUES/SEED`` and ``runs/GROUP/TASK/ARM/SEED``. A run that failed leaves the others alone. What
is finished is kept when the study continues, as long as its configuration is the same.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from lowrank_cli.config.composition import Composed, compose, rebuild
from lowrank_cli.config.sweep import Launcher, is_launcher_override, saved_launcher
from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.launch import stage
from lowrank_cli.launch.launcher_pool import LauncherPool
from lowrank_cli.launch.pool import LOCKS, Pool
from lowrank_cli.launch.running import refuse_running
from lowrank_cli.launch.study_plan import RUNS, TUNING, Cell, Job, Plan, composed_cells, require_plain, split
from lowrank_cli.launch.study_preview import tuning_runs
from lowrank_cli.launch.tuning import Search, Values, require_sampler
from lowrank_cli.launch.workers import Workers
from lowrank_cli.reader import leaves
from lowrank_cli.report import path_format, tables
from lowrank_cli.report.end_of_run import next_steps
from lowrank_cli.report.metric_names import lower_is_better
from lowrank_cli.report.study import Board, tuned_table
from lowrank_cli.runs import FAILED, PENDING, RUNNING, Run, atomic_folder, config_hash, remove_leftovers, stopping
from lowrank_cli.runs.progress import console
from lowrank_cli.runs.records import FAILURES, STUDY, TRIALS, StudyRecord, Tuned
from lowrank_cli.schema import StudyConfig, parse_overrides

COMPARISON = "comparison"  #: folder of the tables and plots for a paper


def plan(verb: str, overrides: list[str], config_dir: str | None) -> tuple[Composed, list[tuple[str, Composed]]]:
    """The configuration of a new study, after a check of every arm on every task, and the study again by its name.

    Its runs are too many to list. What the user sets beyond the study's own keys is added to their overrides.
    """
    launcher = [override for override in overrides if is_launcher_override(override)]
    Launcher(launcher)
    for_study, extra = split([override for override in overrides if override not in launcher])
    composed = compose(verb, for_study, config_dir)
    values = composed.resolved
    values["study"]["extra"] += extra
    folders = values["study"]["folders"]
    for name, path in folders.items():
        if path is not None and not (found := Path(path).expanduser()).exists():
            raise UserError(f"study.folders.{name}: there is no folder or file '{path}'")
        folders[name] = path and str(found.absolute())
    composed = rebuild(verb, values, composed.choices, overrides)
    config = composed.config.study
    require_plain(config)
    for group in config.active():
        if tune := Plan(config).tune(group):
            require_sampler(tune.sampler)
    composed_cells(Plan(config), config_dir)
    return composed, [(verb, composed)]


def remaining(run: Run, composed: Composed) -> list[tuple[str, Composed]]:
    """The configurations that resuming ``run`` would execute, by name.

    All arms on all tasks and all steps of preparation are listed, done or not, with the first seed. Raises UserError
    for keys that no file may set.
    """
    require_plain(composed.config.study)
    cells = composed_cells(Plan(composed.config.study), run.read_json(STUDY).get("config_dir"))
    return [(str(cell), cell_config) for cell, cell_config in cells.items()]


def create(composed: Composed, config_dir: str | None, command: str, folder: Path | None = None) -> Run:
    """Make the study's folder, or take the one that it is to continue."""
    config = composed.config
    kept = config.folder and Path(config.folder).expanduser()
    if kept:
        run = Run.open(kept, key="folder")
        if not (kept / STUDY).is_file():
            raise UserError(f"folder: '{config.folder}' is not the folder of a study (it holds no {STUDY})")
        refuse_running(kept, key="folder")
        _refuse_changed(run, config.study)
        remove_leftovers(kept)
    run = stage.create(composed, config_dir, command, kept.absolute() if kept else folder)
    study: StudyConfig = config.study
    plan = Plan(study)
    record: StudyRecord = {
        "name": study.name,
        "baseline": study.baseline,
        "arms": list(study.arms),
        "pools": study.pools,
        "views": {name: {"arm": v.arm, "metric": v.metric, "bound": v.bound} for name, v in study.views.items()},
        "seeds": study.seeds,
        "groups": {group: list(plan.tasks(group)) for group in plan.groups},
        "config_dir": config_dir and str(Path(config_dir).resolve()),
        "launcher": [override for override in composed.overrides if is_launcher_override(override)],
    }
    run.write_json(STUDY, record)
    return run


def _refuse_changed(run: Run, study: StudyConfig) -> None:
    """Raise UserError where finished runs of the comparison would be made otherwise now, before anything is written."""
    before = Plan(rebuild("study", run.config(), run.info["choices"], []).config.study)
    now = Plan(study)
    still = {*now.cells()}
    for cell in before.cells():
        done = cell in still and any((run.path / RUNS / str(cell)).glob("*/metrics.json"))
        if not done:
            continue
        jobs = [plan.run(cell, {}, 0) for plan in (before, now)]
        old, new = ({word.key: word.value for word in parse_overrides(job.overrides)} for job in jobs)
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                raise UserError(
                    f"folder: its runs of {cell} were made with {key}={old.get(key, 'its default')}, not "
                    f"{new.get(key, 'its default')}; give that, or leave out folder=… for a new study"
                )


def set_launcher(run: Run, launcher: list[str]) -> None:
    """Let a study go on with another launcher than the one that it was started with, if there is one.

    The saved one is used only if it cannot hold a command. Raises UserError.
    """
    record = run.read_json(STUDY)
    record["launcher"] = launcher or saved_launcher(record.get("launcher", []))
    Launcher(record["launcher"])
    run.write_json(STUDY, record)


def work(run: Run, composed: Composed) -> None:
    """Prepare, tune and compare, as far as it is not done, then write the comparison and the page about it.

    Raises:
        WorkFailed: runs failed; all others were made.
    """
    run.begin()
    try:
        with stage.recorded(run):
            study = _Study(run, composed)
            study.prepare()
            best = study.tune()
            study.compare(best)
            if study.failed:
                raise WorkFailed(f"{len(study.failed)} of {len(study.board.states)} runs are not done; {_again(run)}")
            run.finish({"study/runs": len(study.board.states)})
    except WorkFailed:
        _publish(run)
        raise
    _publish(run)


def _again(run: Run) -> str:
    return f"continue with: lrk study --resume {path_format.typed(run.path)}"


def _publish(run: Run) -> None:
    """``comparison/`` (Markdown, CSV, LaTeX, plots) and ``report.html``."""
    from lowrank_cli.report import formats
    from lowrank_cli.report.compare import build_comparison
    from lowrank_cli.report.html import page

    with atomic_folder(run.file(COMPARISON)) as folder:  # a new one: links in the old one could lead elsewhere
        formats.write(build_comparison([run.path]), folder)
    page.write([str(run.path)], None, None, "")


class _Study:
    """The work on a study's folder."""

    def __init__(self, run: Run, composed: Composed):
        config = composed.config
        record = run.read_json(STUDY)
        self.run, self.config_dir = run, record.get("config_dir")
        self.root = run.path.absolute()
        self.plan = Plan(config.study, self.root)
        self.seeds = config.study.seeds
        self.failed: set[str] = set()  #: folders of runs that are not done, for which the study counts as failed
        self.failures: dict[str, str] = {}  #: folder → why, of trials that diverged too
        tasks = [self._column(group, task) for group in self.plan.groups for task in self.plan.tasks(group)]
        self.board = Board(config.study.name, list(config.study.arms), tasks, config.workers)
        self.pool: Pool = Workers(config.workers, self.root / LOCKS)
        if launcher := record.get("launcher"):
            self.pool = LauncherPool(Launcher(launcher), self.root, _again(run))
        self._count_later()
        run.write_json(FAILURES, {})

    def _column(self, group: str, task: str) -> str:
        return task if len(self.plan.groups) == 1 else f"{group}/{task}"

    def _count_later(self) -> None:
        """Tell the board of all runs to come, so that the time left covers them."""
        for cell in self.plan.cells():
            column = self._column(cell.group, cell.task)
            self.board.later[column] += len(self.seeds) + sum(runs for runs, _ in tuning_runs(self.plan, cell))

    def prepare(self) -> None:
        """Run the steps of every group for every seed, one step after another."""
        steps = {group: list(self.plan.steps(group)) for group in self.plan.groups}
        for number in range(max(map(len, steps.values()))):
            self._perform("preparing", [
                self.plan.step(group, names[number], seed)
                for group, names in steps.items()
                if number < len(names)
                for seed in self.plan.seeds(group)
            ])  # fmt: skip

    def tune(self) -> dict[Cell, Values]:
        """Search for the best values of every cell.

        There are none where the arm has nothing to tune, every trial diverged, or a trial failed otherwise: once that
        one is repeated, other values may be best.
        """
        searches: dict[Cell, Search] = {}
        incomplete: set[Cell] = set()
        for cell in dict.fromkeys(map(self.plan.tuned_as, self.plan.cells())):
            tune = self.plan.tune(cell.group)
            if tune and (keys := self.plan.searched(cell)):
                searches[cell] = Search(tune, keys, lower_is_better(tune.metric))
        while trials := [
            (cell, trial) for cell, search in searches.items() if cell not in incomplete for trial in search.propose()
        ]:
            jobs = {
                (cell, seed, number): self.plan.trial(cell, trial.values, seed, trial.part)
                for number, (cell, trial) in enumerate(trials)
                for seed in searches[cell].tune.seeds
            }
            self._perform("tuning", list(jobs.values()))
            for number, (cell, trial) in enumerate(trials):
                tune = searches[cell].tune
                scores = {seed: self._metric(jobs[cell, seed, number], tune.metric) for seed in tune.seeds}
                searches[cell].tell(trial, scores)
                if any(jobs[cell, seed, number].folder in self.failed for seed in tune.seeds):
                    incomplete.add(cell)
            self._widen({cell: search for cell, search in searches.items() if cell not in incomplete})
            self.run.write_json(TRIALS, [_entry(cell, search) for cell, search in searches.items()])
        complete = {cell: search.best() for cell, search in searches.items() if cell not in incomplete}
        return {cell: best for cell, best in complete.items() if best is not None}

    def _metric(self, job: Job, metric: str) -> float | None:
        if job.folder in self.failed or not (run := Run.open(self.root / job.folder)).done:
            return None
        if metric not in run.metrics:
            measured = ", ".join(name for name in run.metrics if name.startswith("dev/"))
            self._fail(job, f"it has no {metric} (it has: {measured or 'nothing of the dev split'})")
        value = run.metrics.get(metric)
        return value if value is not None and math.isfinite(value) else None

    def _widen(self, searches: dict[Cell, Search]) -> None:
        """One more value for all arms on a task of which one arm's best lies at an edge: budgets stay equal.

        A value that an arm does not allow is tried by none.
        """
        for group, task in {(cell.group, cell.task): None for cell in searches}:
            here = {cell: search for cell, search in searches.items() if (cell.group, cell.task) == (group, task)}
            tune = next(iter(here.values())).tune
            if not tune.widen or any(search.propose() for search in here.values()):
                continue
            beyond = dict.fromkeys(value for search in here.values() if (value := search.beyond()) is not None)
            allowed = [value for value in beyond if all(self._allows(cell, value) for cell in here)]
            room = len(next(iter(tune.search.values()))) + tune.widen - max(len(s.trials) for s in here.values())
            for value in allowed[:room]:
                for search in here.values():
                    search.widen(value)
                    self.board.later[self._column(group, task)] += len(tune.seeds)

    def _allows(self, cell: Cell, value: Any) -> bool:
        """Whether a cell's searched key may have a value."""
        tune = self.plan.tune(cell.group)
        assert tune is not None
        (key,) = tune.search
        try:
            self.plan.trial(cell, {key: value}, tune.seeds[0]).composed(self.config_dir)
        except UserError:
            return False
        return True

    def compare(self, best: dict[Cell, Values]) -> None:
        """The final runs, with each arm's best values."""
        jobs: list[Job] = []
        for cell in self.plan.cells():
            values = best.get(self.plan.tuned_as(cell), {})
            if self.plan.searched(cell) and not values:
                tuned = f"{TUNING}/{self.plan.tuned_as(cell)}"
                lost = any(folder.startswith(f"{tuned}/") for folder in self.failed)
                why = f"some trials in {tuned} failed" if lost else f"every trial in {tuned} diverged"
                for seed in self.seeds:
                    self._fail(self.plan.run(cell, {}, seed), why)
            else:
                jobs += [self.plan.run(cell, values, seed) for seed in self.seeds]
        self.board.later = Counter(self._column(job.cell.group, job.cell.task) for job in jobs if job.cell)
        self._perform("comparing", jobs)

    def _perform(self, phase: str, jobs: Sequence[Job]) -> None:
        """Run what is not done of ``jobs``."""
        self.board.phase = phase
        todo: dict[Path, Job] = {}
        screen = console()
        live = Live(self.board, console=screen, refresh_per_second=2, transient=True)
        with live if screen.is_terminal else nullcontext():
            for job in jobs:
                stopping.check()
                if job.cell is not None:
                    self.board.later[self._column(job.cell.group, job.cell.task)] -= 1
                try:
                    run = self._prepared(job)
                except UserError as error:
                    self._fail(job, str(error))
                else:
                    self._show(job, run)
                    if _is_tried(job, run):
                        self._fail(job, tables.first_line(run.info.get("error")), counts=False)
                    elif not run.done:
                        todo[run.path] = job
                        self._set(job, PENDING)

            def ended(folder: Path) -> None:
                job, run = todo[folder], Run.open(folder)
                self._show(job, run)
                if run.info["status"] == FAILED:
                    self._fail(job, tables.first_line(run.info.get("error")), counts=not _is_tried(job, run))
                elif not screen.is_terminal:
                    screen.print(f"{job.folder}: {run.info['status']} ({self.board.headline()})", soft_wrap=True)

            if todo:
                self.pool.run(list(todo), lambda folder: self._set(todo[folder], RUNNING), ended)

    def _prepared(self, job: Job) -> Run:
        """The folder of a run, made where it is not there. Raises UserError where it was made with other overrides."""
        composed = job.composed(self.config_dir)
        folder = self.run.file(job.folder)
        if (folder / "run.json").is_file():
            run = Run.open(folder)
            if run.info["config_hash"] == config_hash(composed.resolved):
                return run
            if run.done:
                raise UserError(f"it was made with {_difference(run, composed)}; move it away")
        return stage.create(composed, self.config_dir, shlex.join(["lrk", job.verb, *composed.overrides]), folder)

    def _show(self, job: Job, run: Run) -> None:
        self._set(job, run.info["status"])
        if run.done and run.info.get("seconds"):
            self.board.took(self._row_and_column(job)[1], run.info["seconds"])

    def _set(self, job: Job, status: str) -> None:
        arm, task = self._row_and_column(job)
        self.board.set(job.folder, arm, task, status)

    def _row_and_column(self, job: Job) -> tuple[str | None, str | None]:
        """Where the board shows a run: arm and task, or neither for a step of preparation."""
        return (job.cell.arm, self._column(job.cell.group, job.cell.task)) if job.cell else (None, None)

    def _fail(self, job: Job, why: str, counts: bool = True) -> None:
        if counts:
            self.failed.add(job.folder)
        self.failures[job.folder] = why
        with suppress(OSError):  # a full disk, for which the run may have failed
            self.run.write_json(FAILURES, self.failures)
        self._set(job, FAILED)
        console().print(f"{job.folder}: {why}", style="red", soft_wrap=True)


def _is_tried(job: Job, run: Run) -> bool:
    """Whether this is a trial whose training diverged: that is its result, and tuning goes on with the others."""
    return job.folder.startswith(f"{TUNING}/") and run.info.get("diverged", False)


def _difference(run: Run, composed: Composed) -> str:
    """The first key that differs, with the value that it had and the one that it has now."""
    old, new = (dict(leaves(values, str(run.path))) for values in (run.config(), composed.resolved))
    key = next(key for key in (*old, *new) if old.get(key) != new.get(key))
    return f"{key}={old.get(key)}, not {new.get(key)}"


def _entry(cell: Cell, search: Search) -> Tuned:
    return {
        "group": cell.group,
        "task": cell.task,
        "arm": cell.arm,
        "metric": search.tune.metric,
        "lower_is_better": search.lower,
        "seeds": search.tune.seeds,
        "keys": list(search.search),
        "trials": [
            {
                "values": trial.values,
                "part": trial.part,
                "scores": {str(seed): score for seed, score in trial.scores.items()},
                "mean": trial.mean,
            }
            for trial in search.trials
        ],
        "best": search.best(),
        "at_edge": search.at_edge(),
    }


def summary(run: Run) -> RenderableType:
    """The comparison, what tuning chose, and what to do next."""
    tuning = run.read_json(TRIALS) if (run.path / TRIALS).is_file() else []
    shown: list[RenderableType] = [tuned_table(tuning)] if tuning else []
    if (run.path / COMPARISON).is_dir():
        from lowrank_cli.report import formats
        from lowrank_cli.report.compare import build_comparison

        shown += [Text(), formats.terminal(build_comparison([run.path]))]
    lines = [f"  folder: {path_format.shown(run.path)}"]
    if (page := run.path / "report.html").is_file():
        lines.append(f"  report: {path_format.shown(page)}")
    ways = next_steps(run)
    return Group(*shown, *(Text(line, no_wrap=True, overflow="ignore") for line in lines), *ways)
