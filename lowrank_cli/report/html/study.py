"""What the page shows of a study's folder: its grid of runs and the tuning of each arm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_json
from lowrank_cli.report.html.charts import comparisons
from lowrank_cli.report.html.charts.svg import NOT_DRAWABLE, Chart
from lowrank_cli.report.html.compared import SectionView
from lowrank_cli.report.number_format import number
from lowrank_cli.report.study import best_score, ends
from lowrank_cli.runs.records import FAILURES, STUDY, TRIALS, StudyRecord, Tuned


def is_study(folder: Path) -> bool:
    return (folder / STUDY).is_file()


def read(folder: Path) -> StudyRecord:
    """``study.json``. Raises UserError if it is broken."""
    return read_json(folder / STUDY, StudyRecord)


def name_of(study: StudyRecord, group: str, task: str) -> str:
    """A task, with its group where there are several."""
    return task if len(study["groups"]) == 1 else f"{group} · {task}"


def run_folders(folder: Path, study: StudyRecord) -> list[tuple[str, Path]]:
    """Name and folder of every run of the comparison, whether it is there or not."""
    return [
        (f"{name_of(study, group, task)} · {arm} · seed {seed}", folder / "runs" / group / task / arm / str(seed))
        for group, tasks in study["groups"].items()
        for task in tasks
        for arm in study["arms"]
        for seed in study["seeds"]
    ]


def failures(folder: Path) -> tuple[list[SectionView], list[str]]:
    """A section with the runs that failed and why, if there are any, and what cannot be read."""
    try:
        why: dict[str, str] = read_json(folder / FAILURES, dict[str, str]) if (folder / FAILURES).is_file() else {}
    except UserError as error:
        return [], [str(error)]
    section = SectionView("Failed", headers=["run", "error"], rows=list(why.items()), left=2)
    return ([section] if why else []), []


def tuning(folder: Path, study: StudyRecord) -> tuple[list[SectionView], list[str]]:
    """A section with each arm's curve on each task, and what cannot be read."""
    if not (folder / TRIALS).is_file():
        return [], []
    try:
        entries: list[Tuned] = read_json(folder / TRIALS, list[Tuned])
    except UserError as error:
        return [], [str(error)]
    section = SectionView("Tuning", "Trials have seeds of their own and measure the dev split, never the test split.")
    if any(trial.get("part", 1) > 1 for entry in entries for trial in entry["trials"]):
        section.notes.append(
            "Successive halving: every setting trains for a part of the steps, with a complete schedule of the "
            "learning rate; the best ones train anew for more of them, and those that are left for all."
        )
    section.warnings += _budgets(entries, study)
    section.fold = "Best values of every arm"
    section.headers, section.left = ["task", "arm", "trials", "failed", "best", "score"], 2
    section.rows = [[name_of(study, entry["group"], entry["task"]), *_row(entry)] for entry in entries]
    for entry in entries:
        where = f"{entry['arm']} on {name_of(study, entry['group'], entry['task'])}"
        if entry["best"] is None:
            section.warnings.append(f"{where}: every trial failed.")
        for key, end in ends(entry).items():
            value = _shown((entry["best"] or {}).get(key))
            section.warnings.append(
                f"{where}: the best {key}, {value}, is at the {end} end of the search; a better one may be beyond it."
            )
    for group, task in dict.fromkeys((entry["group"], entry["task"]) for entry in entries):
        here = [entry for entry in entries if (entry["group"], entry["task"]) == (group, task)]
        title = name_of(study, group, task)
        try:
            section.charts += _charts(title, here)
        except NOT_DRAWABLE:
            section.warnings.append(f"{title}: the scores are too far apart to be drawn.")
    return [section], []


def _charts(task: str, entries: list[Tuned]) -> Iterator[Chart]:
    """All arms on one task: a chart for each searched key and, in successive halving, each rung."""
    parts = sorted({trial.get("part", 1) for entry in entries for trial in entry["trials"]}, reverse=True)
    for key in dict.fromkeys(key for entry in entries for key in entry["keys"]):
        for part in parts:
            curves = [_curve(entry, key, part) for entry in entries if key in entry["keys"]]
            if any(len(curve[1]) > 1 for curve in curves):
                steps = "" if parts == [1] else f" · {'all' if part == 1 else f'1/{part}'} of the steps"
                yield comparisons.tuning(f"{task}{steps}", key, entries[0]["metric"], curves)


def _budgets(entries: list[Tuned], study: StudyRecord) -> Iterator[str]:
    """Where arms had different numbers of trials: one that knows fewer of the searched keys has fewer in a grid."""
    for group, task in dict.fromkeys((entry["group"], entry["task"]) for entry in entries):
        counts = {e["arm"]: len(e["trials"]) for e in entries if (e["group"], e["task"]) == (group, task)}
        if len({*counts.values()}) > 1:
            listed = ", ".join(f"{arm} {count}" for arm, count in counts.items())
            yield f"{name_of(study, group, task)}: the arms had different numbers of trials: {listed}."


def _row(entry: Tuned) -> list[str]:
    failed = sum(trial["mean"] is None for trial in entry["trials"])
    best = entry["best"] or {}
    shown = ", ".join(f"{key.rpartition('.')[2]} {_shown(value)}" for key, value in best.items())
    score = best_score(entry)
    return [entry["arm"], str(len(entry["trials"])), str(failed), shown or "–", "–" if score is None else number(score)]


def _curve(entry: Tuned, key: str, part: int) -> tuple[str, list[tuple[float, float]], float | None, bool]:
    """The arm's scores over ``key`` after ``1 / part`` of the steps.

    Of several trials with one value, as in a search over more keys, it is the best.
    """
    best_of: dict[float, float] = {}
    choose = min if entry["lower_is_better"] else max
    for trial in entry["trials"]:
        value, score = trial["values"].get(key), trial["mean"]
        if isinstance(value, int | float) and score is not None and trial.get("part", 1) == part:
            best_of[float(value)] = choose(score, best_of.get(float(value), score))
    best = (entry["best"] or {}).get(key)
    chosen = float(best) if isinstance(best, int | float) and part == 1 else None
    return entry["arm"], list(best_of.items()), chosen, key in entry["at_edge"]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
