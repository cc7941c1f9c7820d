"""What the page shows of a study's folder: its grid of runs and the tuning of each arm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_json
from lowrank_cli.report.html.charts import comparisons
from lowrank_cli.report.html.charts.svg import NOT_DRAWABLE
from lowrank_cli.report.html.compared import SectionView
from lowrank_cli.report.number_format import number
from lowrank_cli.runs.records import STUDY, TRIALS, StudyRecord, Tuned


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


def tuning(folder: Path, study: StudyRecord) -> tuple[list[SectionView], list[str]]:
    """A section with each arm's curve on each task, and what cannot be read."""
    if not (folder / TRIALS).is_file():
        return [], []
    try:
        entries: list[Tuned] = read_json(folder / TRIALS, list[Tuned])
    except UserError as error:
        return [], [str(error)]
    section = SectionView("Tuning", "Trials have seeds of their own and measure the dev split, never the test split.")
    section.warnings += _budgets(entries, study)
    section.fold = "Best values of every arm"
    section.headers, section.left = ["task", "arm", "trials", "failed", "best", "score"], 2
    section.rows = [[name_of(study, entry["group"], entry["task"]), *_row(entry)] for entry in entries]
    for entry in entries:
        where = f"{entry['arm']} on {name_of(study, entry['group'], entry['task'])}"
        if entry["best"] is None:
            section.warnings.append(f"{where}: every trial failed.")
        for key in entry["at_edge"]:
            value = (entry["best"] or {}).get(key)
            section.warnings.append(
                f"{where}: the best {key}, {_shown(value)}, is at an edge of the search; a better one may be beyond it."
            )
    for group, task in dict.fromkeys((entry["group"], entry["task"]) for entry in entries):
        here = [entry for entry in entries if (entry["group"], entry["task"]) == (group, task)]
        for key in dict.fromkeys(key for entry in here for key in entry["keys"]):
            curves = [_curve(entry, key) for entry in here if key in entry["keys"]]
            if any(len(curve[1]) > 1 for curve in curves):
                title = name_of(study, group, task)
                try:
                    section.charts.append(comparisons.tuning(title, key, here[0]["metric"], curves))
                except NOT_DRAWABLE:
                    section.warnings.append(f"{title}: the scores are too far apart to be drawn.")
    return [section], []


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
    means = [trial["mean"] for trial in entry["trials"] if trial["values"] == best and trial["mean"] is not None]
    shown = ", ".join(f"{key.rpartition('.')[2]} {_shown(value)}" for key, value in best.items())
    score = number(means[0]) if means else "–"
    return [entry["arm"], str(len(entry["trials"])), str(failed), shown or "–", score]


def _curve(entry: Tuned, key: str) -> tuple[str, list[tuple[float, float]], float | None, bool]:
    """The arm's scores over ``key``; of several trials with one value, as in a search over more keys, the best."""
    best_of: dict[float, float] = {}
    choose = min if entry["lower_is_better"] else max
    for trial in entry["trials"]:
        value, score = trial["values"].get(key), trial["mean"]
        if isinstance(value, int | float) and score is not None:
            best_of[float(value)] = choose(score, best_of.get(float(value), score))
    best = (entry["best"] or {}).get(key)
    chosen = float(best) if isinstance(best, int | float) else None
    return entry["arm"], list(best_of.items()), chosen, key in entry["at_edge"]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
