"""A comparison as CSV: one line for each row of a section, then one for each result over several tasks."""

from __future__ import annotations

import csv
import io
from typing import Any

from lowrank_cli.report.comparison import AcrossTasks, Comparison, Difference, Row, Section


def csv_text(comparison: Comparison) -> str:
    """Numbers unrounded, absent ones empty; ``task`` is empty over all tasks."""
    baseline = comparison.baseline
    records = [_row(section, row, baseline) for section in comparison.sections for row in section.rows]
    records += [_across(result, baseline) for result in comparison.across_tasks]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def _row(section: Section, row: Row, baseline: str | None) -> dict[str, Any]:
    smallest, largest = row.range
    return {
        "model": section.model,
        "task": section.task,
        "method": row.method,
        "setting": row.setting,
        "shared": section.shared,
        "metric": section.metric,
        "lower_is_better": section.lower_is_better,
        "n": len(row.values),
        "median": row.median,
        "interval_low": row.low,
        "interval_high": row.high,
        "mean": row.mean,
        "std": row.std,
        "min": smallest,
        "max": largest,
        "arrangement_std": row.arrangement_std,
        "arrangement_worst": row.arrangement_worst,
        "best": row.best,
        "bound": row.bound,
        "baseline": baseline,
        **_difference(row.difference),
        "trainable_parameters": row.trainable,
        "activated_parameters": row.activated,
        "train_seconds": row.seconds,
        "peak_memory_bytes": row.memory,
        "pareto": " ".join(row.pareto),
        "seeds": " ".join(map(str, row.values)),
        "values": " ".join(map(str, row.values.values())),
    }


def _difference(difference: Difference | None) -> dict[str, Any]:
    bootstrap = (difference.bootstrap if difference else None) or (None, None)
    return {
        "pairs": difference and difference.pairs,
        "test_examples": difference and difference.examples,
        "mean_difference": difference and difference.mean,
        "difference_low": difference and difference.low,
        "difference_high": difference and difference.high,
        "p_value": difference and difference.p_value,
        "p_holm": difference and difference.p_holm,
        "p_sign_flip": difference and difference.sign_flip,
        "detectable": difference and difference.detectable,
        "bootstrap_low": bootstrap[0],
        "bootstrap_high": bootstrap[1],
    }


def _across(result: AcrossTasks, baseline: str | None) -> dict[str, Any]:
    return {
        "model": result.model,
        "method": result.method,
        "baseline": baseline,
        "pairs": result.pairs,
        "mean_difference": result.mean,
        "difference_low": result.low,
        "difference_high": result.high,
        "p_value": result.p_value,
        "p_holm": result.p_holm,
        "p_sign_flip": result.sign_flip,
        "detectable": result.detectable,
    }
