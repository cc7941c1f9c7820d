"""A study's folder as sections of a comparison: one for each group and task, a row for each arm and pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_json
from lowrank_cli.report.comparison import Row, Section
from lowrank_cli.report.run_results import Result, by_test_set, empty_row, new_section, own_metric, result_of, row_of
from lowrank_cli.runs import Run
from lowrank_cli.runs.records import STUDY, StudyRecord, ViewRecord
from lowrank_cli.schema.study import UNGROUPED


@dataclass
class StudyResults:
    """The finished cells of a study; a cell is one seed of one arm on one task of a group."""

    record: StudyRecord
    results: dict[tuple[str, str], dict[str, dict[int, Result]]]  #: group and task → arm → seed
    broken: list[str]  #: why each broken cell cannot be read
    cells: int

    @property
    def missing(self) -> int:
        """Cells without a finished run."""
        return self.cells - sum(len(by_seed) for arms in self.results.values() for by_seed in arms.values())

    @property
    def absent(self) -> dict[str, list[str]]:
        """The arms without any finished run, by the task (with its group where there are several) that lacks them."""
        named = len(self.record["groups"]) > 1
        arms_of = {(f"{g}/{t}" if named else t): arms for (g, t), arms in self.results.items()}
        missing = {task: [arm for arm in self.record["arms"] if arm not in arms] for task, arms in arms_of.items()}
        return {task: arms for task, arms in missing.items() if arms}

    @property
    def metrics(self) -> set[str]:
        """The metrics that any cell has."""
        every = (result for arms in self.results.values() for by_seed in arms.values() for result in by_seed.values())
        return {name for result in every for name in result.metrics}


def read_study(folder: Path) -> StudyResults:
    """The finished cells of a study, which may still be running. Raises UserError for a broken study.json."""
    record: StudyRecord = read_json(folder / STUDY, StudyRecord)
    study = StudyResults(record, {}, [], 0)
    for group, tasks in record["groups"].items():
        for task in tasks:
            arms = study.results.setdefault((group, task), {})
            for arm in record["arms"]:
                for seed in record["seeds"]:
                    study.cells += 1
                    cell = folder / "runs" / group / task / arm / str(seed)
                    try:
                        result = _finished(cell)
                    except UserError as error:
                        study.broken.append(str(error).removeprefix("run: "))
                    else:
                        if result is not None:
                            arms.setdefault(arm, {})[seed] = result
    return study


def _finished(cell: Path) -> Result | None:
    if not (cell / "run.json").is_file():
        return None
    run = Run.open(cell)
    if missing := {"method", "model", "task"} - run.info.get("choices", {}).keys():
        raise UserError(f"{cell / 'run.json'}: choices.{min(missing)} is missing")
    return result_of(run) if run.done and run.metrics else None


def study_sections(study: StudyResults, metric: str | None) -> list[Section]:
    """A section for each group and task with a finished cell that has ``metric``, or else the task's own."""
    sections = []
    for (group, task), arms in study.results.items():
        results = [result for by_seed in arms.values() for result in by_seed.values()]
        name = metric or own_metric(results)
        measured = [result for result in results if name in result.metrics]
        sets = by_test_set(measured, name)
        for number, (test_set, members) in enumerate(sets.items()):
            own = set(map(id, members))
            here = {
                arm: {seed: result for seed, result in by_seed.items() if id(result) in own}
                for arm, by_seed in arms.items()
            }
            rows = {arm: row_of(arm, "", name, by_seed) for arm, by_seed in here.items() if by_seed}
            pools = study.record.get("pools", {}).items()
            pooled = [row for pool, arms_ in pools if (row := _pool(pool, [rows[arm] for arm in arms_ if arm in rows]))]
            views = [item for item in study.record.get("views", {}).items() if item[1]["arm"] in rows]
            viewed = [row for view, record in views if (row := _view(view, record, name, here[record["arm"]]))]
            # without groups, sections are named after the model
            model = results[0].model if list(study.record["groups"]) == [UNGROUPED] else group
            title = task + test_set.removeprefix(members[0].task)
            section = new_section(model, title, name, [*rows.values(), *pooled, *viewed])
            section.without_metric = 0 if number else len(results) - len(measured)
            section.others = len(sets) > 1
            sections.append(section)
    return sections


def _view(name: str, record: ViewRecord, metric: str, by_seed: Mapping[int, Result]) -> Row | None:
    """Another metric of an arm's runs; None without one. Costs are the arm's: one pass gave both."""
    viewed = {}
    for seed, result in by_seed.items():
        values = {end: result.metrics.get(f"{metric}_{record['metric']}{end}") for end in ("", "_std", "_worst")}
        if values[""] is not None:
            others = {name: value for name, value in result.metrics.items() if not name.startswith(metric)}
            own = {f"{metric}{end}": value for end, value in values.items() if value is not None}
            viewed[seed] = replace(result, metrics={**others, **own})
    if not viewed:
        return None
    row = row_of(name, "", metric, viewed)
    row.view, row.bound = record["metric"], record["bound"]
    return row


def _pool(name: str, members: list[Row]) -> Row | None:
    """The mean of several arms by seed, over the seeds that all of them have; None without one."""
    seeds = sorted(set.intersection(*(set(row.values) for row in members))) if members else []
    if not seeds:
        return None
    values = {seed: [row.values[seed] for row in members] for seed in seeds}
    pool = empty_row(name, "", {seed: fmean(of_arms) for seed, of_arms in values.items()})
    pool.pool, pool.pool_values = tuple(row.method for row in members), values
    pool.runs = {seed: [folder for row in members for folder in row.runs[seed]] for seed in seeds}
    pool.answers = {seed: [folder for row in members for folder in row.answers.get(seed, [])] for seed in seeds}
    return pool
