"""A comparison with shares in percent, as papers write them."""

from __future__ import annotations

import copy
from typing import Any

from lowrank_cli.report.comparison import Comparison
from lowrank_cli.report.metric_names import is_share

ROW = ("median", "low", "high", "mean", "std", "arrangement_std", "arrangement_worst")
DIFFERENCE = ("mean", "low", "high", "detectable")


def in_percent(comparison: Comparison) -> Comparison:
    """A copy in which accuracy and other metrics between 0 and 1 are 0 to 100; other metrics are as they were."""
    scaled = copy.deepcopy(comparison)
    shares = [section for section in scaled.sections if is_share(section.metric)]
    for section in shares:
        section.metric += " in %"
        for row in section.rows:
            row.values = {seed: 100 * value for seed, value in row.values.items()}
            _scale(row, ROW)
            if row.difference is not None:
                _scale(row.difference, DIFFERENCE)
    if len(shares) == len(scaled.sections):
        for result in scaled.across_tasks:
            _scale(result, DIFFERENCE)
    return scaled


def _scale(item: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if (value := getattr(item, name)) is not None:
            setattr(item, name, 100 * value)
