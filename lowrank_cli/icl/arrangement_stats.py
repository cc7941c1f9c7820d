"""How far results differ between arrangements of demonstrations: numbers, and descriptions of figures to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from lowrank_cli.icl.demonstrations import Arrangement


@dataclass(frozen=True)
class Result:
    """Answers behind one arrangement."""

    way: Arrangement
    metric: str
    value: float
    demonstrations: list[int] | None  #: indices into D; None where each query has its own
    records: list[dict[str, Any]]

    @property
    def summary(self) -> dict[str, Any]:
        """A line of ``arrangements.json``."""
        return {**asdict(self.way), self.metric: self.value, "demonstrations": self.demonstrations}


def metrics(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation and worst case of several values; of one value only itself."""
    if len(values) == 1:
        return {name: values[0]}
    return {name: mean(values), f"{name}_std": stdev(values), f"{name}_worst": min(values)}


def confusion(results: Sequence[Result], words: Sequence[str], split: str) -> dict[str, Any]:
    """The share of each label's queries that got each answer, over all arrangements."""
    counts = [[0] * len(words) for _ in words]
    for record in (record for result in results for record in result.records):
        counts[record["label"]][record["choice"]] += 1
    behind = f", behind {len(results)} arrangements of demonstrations" if len(results) > 1 else ""
    return {
        "file": "confusion.png",
        "kind": "heatmap",
        "title": f"Answers to {split} queries of each label{behind}",
        "rows": list(words),
        "columns": list(words),
        "values": [[count / sum(row) if sum(row) else None for count in row] for row in counts],
        "label": "share of the label's queries",
        "row_label": "label",
        "column_label": "answer",
    }


def box(results: Sequence[Result], split: str) -> dict[str, Any]:
    """All results, and those where one of the three choices differs and the others are the first.

    Where only one differs at all, that is all results.
    """
    groups = {"all": [result.value for result in results]}
    for key in ("draw", "permutation", "template"):
        others = [name for name in ("draw", "permutation", "template") if name != key]
        same = [result.value for result in results if not any(getattr(result.way, name) for name in others)]
        if 1 < len(same) < len(results):
            groups[f"{key}s alone"] = same
    return {
        "file": "spread.png",
        "kind": "box",
        "title": f"{split} {results[0].metric} over {len(results)} arrangements of demonstrations",
        "rows": list(groups),
        "values": list(groups.values()),
        "label": results[0].metric,
    }


def curve(key: str, values: Sequence[float], results: Sequence[Sequence[Result]], split: str) -> dict[str, Any]:
    """Mean and worst case over the values of a setting."""
    metric = results[0][0].metric
    found = [[result.value for result in row] for row in results]
    rows = {"mean": [mean(row) for row in found]} | ({"worst": [min(r) for r in found]} if len(found[0]) > 1 else {})
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
