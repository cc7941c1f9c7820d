"""Statistics over arrangements of demonstrations: metrics, and descriptions of figures for ``figures.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from lowrank_cli.icl.demonstrations import Arrangement


@dataclass(frozen=True)
class Result:
    """The answers to all queries after one arrangement of demonstrations."""

    arrangement: Arrangement
    metric: str
    value: float
    demonstrations: list[int] | None  #: indices into the pool; None if each query has different ones
    records: list[dict[str, Any]]

    @property
    def summary(self) -> dict[str, Any]:
        """An entry of ``arrangements.json``."""
        return {**asdict(self.arrangement), self.metric: self.value, "demonstrations": self.demonstrations}


def metrics(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation and worst case of several values; a single value by itself."""
    if len(values) == 1:
        return {name: values[0]}
    return {name: mean(values), f"{name}_std": stdev(values), f"{name}_worst": min(values)}


def confusion(results: Sequence[Result], words: Sequence[str], split: str) -> dict[str, Any]:
    """A figure: the share of each label's queries that got each answer, over all arrangements."""
    counts = [[0] * len(words) for _ in words]
    for record in (record for result in results for record in result.records):
        counts[record["label"]][record["choice"]] += 1
    over = f", over {len(results)} arrangements of demonstrations" if len(results) > 1 else ""
    return {
        "file": "confusion.png",
        "kind": "heatmap",
        "title": f"Answers to {split} queries of each label{over}",
        "rows": list(words),
        "columns": list(words),
        "values": [[count / sum(row) if sum(row) else None for count in row] for row in counts],
        "label": "share of the label's queries",
        "row_label": "label",
        "column_label": "answer",
    }


def box(results: Sequence[Result], split: str) -> dict[str, Any]:
    """A figure: all results, and for each of set, order and template the results in which it alone varies."""
    groups = {"all": [result.value for result in results]}
    for key in ("draw", "permutation", "template"):
        others = [name for name in ("draw", "permutation", "template") if name != key]
        alone = [result.value for result in results if not any(getattr(result.arrangement, name) for name in others)]
        if 1 < len(alone) < len(results):
            groups[f"{key}s alone"] = alone
    return {
        "file": "spread.png",
        "kind": "box",
        "title": f"{split} {results[0].metric} over {len(results)} arrangements of demonstrations",
        "rows": list(groups),
        "values": list(groups.values()),
        "label": results[0].metric,
    }


def curve(key: str, values: Sequence[float], results: Sequence[Sequence[Result]], split: str) -> dict[str, Any]:
    """A figure: mean and worst case of ``results[i]`` over ``values[i]`` of the setting ``key``."""
    metric = results[0][0].metric
    scores = [[result.value for result in row] for row in results]
    rows = {"mean": [mean(row) for row in scores]} | ({"worst": [min(r) for r in scores]} if len(scores[0]) > 1 else {})
    return {
        "file": f"{key}.png",
        "kind": "lines",
        "title": f"{split} {metric} over {key}",
        "rows": list(rows),
        "columns": list(values),
        "values": list(rows.values()),
        "label": metric,
        "column_label": key,
    }
