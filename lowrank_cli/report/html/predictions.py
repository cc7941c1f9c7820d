"""Rows of ``predictions.jsonl`` for the page's browser."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from lowrank_cli.errors import escaped
from lowrank_cli.reader import read_json_lines
from lowrank_cli.runs import Run
from lowrank_cli.schema import METRICS

Row = tuple[int, str, str | None, str, bool | None]  #: number, prompt, answer, expected answers, whether it is right

#: Metrics that grade an answer instead of calling it right or wrong.
GRADED = [name for name, metric in METRICS.items() if not metric.share]


class Prediction(TypedDict):
    """One line of ``predictions.jsonl``."""

    prompt: str
    prediction: str | None
    references: list[str]
    index: NotRequired[int]
    task: NotRequired[str]
    label: NotRequired[int | None]
    choice: NotRequired[int | None]
    correct: NotRequired[bool]


def rows(run: Run, metrics: dict[str, Any]) -> list[Row]:
    """Every answer of the run, in order.

    An answer is right if the run noted it as ``correct``. In runs that noted nothing it is right if it is the choice
    that the label names, or else if it equals a reference but for case and white space; and neither right nor wrong
    where the metric grades answers. Raises UserError for a broken file.
    """
    path = run.path / "predictions.jsonl"
    records = read_json_lines(path, Prediction) if path.is_file() else []
    graded = any(name.rpartition("/")[2] in GRADED for name in metrics)
    return [
        (
            record.get("index", number),
            escaped(f"[{record['task']}] {record['prompt']}" if "task" in record else record["prompt"]),
            None if record["prediction"] is None else escaped(record["prediction"]),
            escaped(" | ".join(record["references"])),
            _right(record, graded),
        )
        for number, record in enumerate(records)
    ]


def _right(record: Prediction, graded: bool) -> bool | None:
    if "correct" in record:
        return record["correct"]
    if record.get("choice") is not None and record.get("label") is not None:
        return record["choice"] == record["label"]
    if graded:
        return None
    answer = record["prediction"]
    return answer is not None and _plain(answer) in map(_plain, record["references"])


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
