"""Each method against the baseline on all tasks of a model together, with random effects of task and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from lowrank_cli.report.comparison import AcrossTasks, Row, Section
from lowrank_cli.report.metric_names import is_loss
from lowrank_cli.report.statistics import holm, mixed_mean, sign_flip_test


def across_tasks(sections: Sequence[Section]) -> list[AcrossTasks]:
    """For each model and method that was tested on two tasks or more, in the order of its first task."""
    several = {(s.model, row.method) for s in sections for row in s.rows if _count(s, row.method) > 1}
    grouped: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for section in sections:
        for row in section.rows:
            if row.baseline is not None and row.difference is not None and not row.bound:
                name = row.label if (section.model, row.method) in several else row.method
                if differences := _differences(row, row.baseline, section.metric):
                    grouped.setdefault((section.model, name), {})[section.task] = differences
    results = [_across(*key, tasks) for key, tasks in grouped.items() if len(tasks) > 1]
    for model in {result.model for result in results}:
        tested = [i for i, result in enumerate(results) if result.model == model and result.p_value is not None]
        for i, p in zip(tested, holm([results[i].p_value or 0.0 for i in tested]), strict=True):
            results[i] = replace(results[i], p_holm=p)
    return results


def _count(section: Section, method: str) -> int:
    return sum(row.method == method for row in section.rows)


def _differences(row: Row, baseline: Row, metric: str) -> dict[int, float]:
    """Seed → difference on a scale that tasks share: log of losses (-0.1: about 10 % less), BLEU as 0 to 1.

    A pair with a loss of 0, which has no logarithm, is left out.
    """
    loss = is_loss(metric)

    def scaled(value: float) -> float:
        return math.log(value) if loss else value / 100 if metric.endswith("bleu") else value

    shared = sorted(row.values.keys() & baseline.values.keys())
    shared = [seed for seed in shared if not loss or min(row.values[seed], baseline.values[seed]) > 0]
    return {seed: scaled(row.values[seed]) - scaled(baseline.values[seed]) for seed in shared}


def _across(model: str, method: str, tasks: dict[str, dict[int, float]]) -> AcrossTasks:
    """One method's result.

    Args:
        tasks: task → seed → difference.
    """
    cells = [(task, seed, value) for task, by_seed in tasks.items() for seed, value in by_seed.items()]
    names, seeds, values = zip(*cells, strict=True)
    by_seed = [fmean(value for _, own, value in cells if own == seed) for seed in dict.fromkeys(seeds)]
    estimate = mixed_mean(values, names, seeds)
    low, high = estimate.interval() if estimate else (None, None)
    return AcrossTasks(
        model,
        method,
        len(tasks),
        len(cells),
        estimate.mean if estimate else fmean(values),
        low,
        high,
        p_value=estimate.p_value() if estimate else None,
        p_holm=None,
        sign_flip=sign_flip_test(by_seed),
        detectable=estimate.detectable() if estimate else None,
    )
