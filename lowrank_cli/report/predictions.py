"""Which test examples a run answered correctly, from its ``predictions.jsonl``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NotRequired, TypedDict

from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_json_lines


class Prediction(TypedDict):
    """The keys of a line that are read here."""

    prompt: str
    references: list[str]
    task: NotRequired[str]  # of a mix
    correct: NotRequired[bool]  # where the metric is a share of correct answers
    correct_share: NotRequired[float]  # over several arrangements of demonstrations
    beside: NotRequired[dict[str, float]]  # such shares by further calibrations of the same answers


@dataclass(frozen=True)
class Answers:
    """One run's answers to the examples of a test set."""

    questions: tuple[object, ...]  #: prompt and references of each example
    correct: tuple[float, ...]  #: the share of a run's arrangements of demonstrations whose answer is right


def answers(folder: Path, metric: str, value: float, view: str = "") -> Answers | None:
    """The answers behind a metric that is a share of correct answers; None for another metric.

    Args:
        folder: of the run.
        metric: such as ``test/accuracy``, or of one task of a mix ``test/TASK/accuracy``.
        value: of the metric, as the run recorded it. Answers with another share are not those that it measured.
        view: the calibration beside the run's own whose answers are meant, by its name.
    """
    _, *task, _ = metric.split("/")
    try:
        lines: list[Prediction] = _lines(folder / "predictions.jsonl")
    except UserError:
        return None
    if task:
        lines = [line for line in lines if line.get("task") == task[0]]
    shares = [
        line.get("beside", {}).get(view) if view else line.get("correct_share", line.get("correct")) for line in lines
    ]
    correct = tuple(float(share) for share in shares if share is not None)
    if not lines or len(correct) < len(lines) or not math.isclose(sum(correct) / len(lines), value, abs_tol=1e-6):
        return None
    return Answers(tuple((line["prompt"], *line["references"]) for line in lines), correct)


@lru_cache(maxsize=64)  # the baseline's are read for every row
def _lines(path: Path) -> list[Prediction]:
    return read_json_lines(path, Prediction)
