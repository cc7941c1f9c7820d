"""Statistics over arrangements of demonstrations: metrics, and descriptions of figures for ``figures.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean, stdev
from typing import Any

import torch

from lowrank_cli.calibration.oracle import best_offsets
from lowrank_cli.icl.demonstrations import Arrangement


@dataclass(frozen=True)
class Result:
    """The answers to all queries after one arrangement of demonstrations."""

    arrangement: Arrangement
    metric: str
    value: float
    demonstrations: list[int] | None  #: indices into the pool; None if each query has different ones
    records: list[dict[str, Any]]
    probes: int = 0  #: further inputs that were scored
    oracles: dict[str, float] = field(default_factory=dict)  #: values of the metric by name, see :func:`with_oracles`


def summaries(results: Sequence[Result], beside: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    """The entries of ``arrangements.json``: the metric, by the calibrations beside too, and what was shown."""
    entries = []
    for index, result in enumerate(results):
        others = {name: of[index].value for name, of in beside.items()}
        values = {result.metric: result.value, **result.oracles, **others}
        entries.append({**asdict(result.arrangement), **values, "demonstrations": result.demonstrations})
    return entries


def with_oracles(
    results: Sequence[Result], words: Sequence[Sequence[str]], measure: Callable[[list[dict[str, Any]]], float]
) -> list[Result]:
    """The results, each with the metric that the best offsets of the answers' scores would have given.

    ``oracle_all_sets`` is with one offset for each answer in all results, ``oracle_each_set`` with offsets of its own.

    Args:
        words: the label words of each template.
        measure: the metric of records.
    """
    scores = [torch.tensor([record["scores"] for record in result.records]).double() for result in results]  # (N, C)
    labels = [torch.tensor([record["label"] for record in result.records]) for result in results]  # (N,)
    together = torch.cat(scores)  # (R * N, C)
    common = best_offsets(together, torch.cat(labels), torch.zeros_like(together[0]))  # (C,)
    bounded = []
    for result, rows, right in zip(results, scores, labels, strict=True):
        offsets = {"oracle_all_sets": common, "oracle_each_set": best_offsets(rows, right, common)}
        values = {}
        for name, added in offsets.items():
            choices = (rows + added).argmax(dim=1).tolist()
            of_template = words[result.arrangement.template]
            pairs = zip(result.records, choices, strict=True)
            values[name] = measure([{**record, "prediction": of_template[choice]} for record, choice in pairs])
        bounded.append(replace(result, oracles=values))
    return bounded


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
