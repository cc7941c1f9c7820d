"""A study for the terminal: the table that is live while it runs, its plan, and what tuning chose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from lowrank_cli.report.number_format import duration, number
from lowrank_cli.report.tables import NONE, STATUS_STYLES, Fitted
from lowrank_cli.runs.records import Tuned

ENDED = ("done", "failed")


class Board:
    """How far a study is: a row for each arm, a column for each task, with runs done, going on and failed.

    Args:
        arms: names of the arms.
        tasks: names of the tasks, with their group where there are several.
    """

    def __init__(self, name: str, arms: Sequence[str], tasks: Sequence[str], workers: int):
        self.name, self.arms, self.tasks, self.workers = name, arms, tasks, workers
        self.phase = "preparing"
        self.states: dict[str, tuple[str | None, str | None, str]] = {}  #: folder → arm, task, status
        self.seconds: dict[str | None, list[float]] = {}  #: task → of its finished runs
        self.later: Counter[str | None] = Counter()  #: task → runs of later phases, as far as they are known

    def set(self, folder: str, arm: str | None, task: str | None, status: str) -> None:
        self.states[folder] = arm, task, status

    def took(self, task: str | None, seconds: float) -> None:
        self.seconds.setdefault(task, []).append(seconds)

    def left(self) -> float | None:
        """Seconds that the rest takes, by the runs so far; None before the first has ended."""
        every = [seconds for of_task in self.seconds.values() for seconds in of_task]
        if not every:
            return None
        rest = Counter(self.later)
        rest.update(task for _, task, status in self.states.values() if status not in ENDED)
        means = {task: sum(of_task) / len(of_task) for task, of_task in self.seconds.items()}
        overall = sum(every) / len(every)
        return sum(runs * means.get(task, overall) for task, runs in rest.items()) / self.workers

    def headline(self) -> str:
        counts = Counter(status for _, _, status in self.states.values())
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        left = self.left()
        rest = f", about {duration(left)} left" if left else ""
        total = len(self.states) + sum(self.later.values())
        return f"{self.name}: {self.phase}, {counts['done']} of {total} runs{failed}{rest}"

    def __rich__(self) -> RenderableType:
        table = Fitted(self.headline(), ["arm", *self.tasks], leave_out=[])
        cells: dict[tuple[str | None, str | None], Counter[str]] = {}
        for arm, task, status in self.states.values():
            cells.setdefault((arm, task), Counter())[status] += 1
        for arm in self.arms:
            if any((arm, task) in cells for task in self.tasks):
                table.rows.append([arm, *(_counted(cells.get((arm, task))) for task in self.tasks)])
        return table


def _counted(states: Counter[str] | None) -> Text:
    if not states:
        return Text(NONE, style="dim")
    total = sum(states.values())
    text = Text(f"{states['done']}/{total}", style=STATUS_STYLES["done"] if states["done"] == total else "")
    for status in ("running", "failed", "interrupted"):
        if states[status]:
            text.append(f" {states[status]} {status}", style=STATUS_STYLES[status])
    return text


def best_score(entry: Tuned) -> float | None:
    """The score of the chosen values, trained to the end."""
    every = entry["trials"]
    return next((t["mean"] for t in every if t["values"] == entry["best"] and t.get("part", 1) == 1), None)


def ends(entry: Tuned) -> dict[str, str]:
    """The end of the search at which the best value of a key lies, for each key that has it at one."""
    found = entry["at_edge"]
    return found if isinstance(found, dict) else dict.fromkeys(found, "outer")


def tuned_table(tuning: Iterable[Tuned]) -> RenderableType:
    """Each arm's best values, and at which end of what was searched they lie."""
    table = Fitted("tuned", ["arm", "task", "trials", "best", "score", "note"], leave_out=["trials", "score"])
    for entry in tuning:
        best = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in (entry["best"] or {}).items())
        edges = [f"{key.rpartition('.')[2]} at its {end} end" for key, end in ends(entry).items()]
        lost = sum(trial["mean"] is None for trial in entry["trials"]) if entry["best"] else 0
        note = Text(", ".join([*([f"{lost} failed"] if lost else []), *edges]), style="yellow")
        score, trials = best_score(entry), str(len(entry["trials"]))
        table.rows.append([
            entry["arm"], f"{entry['group']}/{entry['task']}", trials, best or "every trial failed",
            NONE if score is None else number(score), note,
        ])  # fmt: skip
    return Group(table) if table.rows else Text("")
