"""The footnotes of a comparison: what the columns mean, and which runs are not in them."""

from __future__ import annotations

from collections.abc import Iterable

from lowrank_cli.report.comparison import Comparison, Row
from lowrank_cli.report.formats.columns import BOUND, PARETO, STAR
from lowrank_cli.report.metric_names import is_loss
from lowrank_cli.report.tables import NONE

EXACT = 6  #: seeds from which on an interval of 95 % for a median can be told by order statistics


def footnotes(comparison: Comparison) -> list[str]:
    """One line each, only those that apply."""
    rows = [row for section in comparison.sections for row in section.rows]
    return [
        *_columns(comparison, rows),
        *_differences(comparison, rows),
        *_marks(comparison, rows),
        *_absent(comparison),
    ]


def _columns(comparison: Comparison, rows: list[Row]) -> Iterable[str]:
    if not rows:
        return
    line = "n counts seeds."
    if any(len(row.values) > 1 for row in rows):
        few = sorted({n for row in rows if 1 < (n := len(row.values)) < EXACT})
        covered = ", ".join(f"{100 * (1 - 2 ** (1 - n)):.0f} % for {n}" for n in few)
        line += " interval: of the median, 95 % by order statistics from 6 seeds on" + (
            f"; below, the range of the seeds, which covers the median with probability 1 - 2^(1-n): {covered} seeds."
            if few
            else "."
        )
    if any(row.std is not None for row in rows):
        line += " std: sample standard deviation over seeds."
    yield line
    if any(row.arrangement_worst is not None for row in rows):
        yield (
            "std within and worst: standard deviation and minimum of the metric over several arrangements of "
            "demonstrations within a run (medians over seeds); the metric is then the mean over them."
        )
    if any(row.pool for row in rows):
        pools = {row.method: row.pool for row in rows if row.pool}
        yield "; ".join(f"{name}: mean of {', '.join(arms)} by seed" for name, arms in pools.items()) + "."


def _differences(comparison: Comparison, rows: list[Row]) -> Iterable[str]:
    if comparison.baseline is None or not rows:
        return
    yield (
        f"vs {comparison.baseline}: mean difference over pairs of the same seed, its 95 % t interval and the p of the "
        "same test, corrected by Holm for the other rows of the table. sign-flip: p over the pairs (their number) "
        "without assumptions; n pairs cannot give p below 2^(1-n), so 0.05 needs 6. detectable: the true difference "
        "that this test, uncorrected, would find with 80 % power; smaller ones can easily be missed."
    )
    compared = [row for row in rows if row.difference is not None]
    compared = [row for row in compared if not row.bound]
    without = [row.label for row in compared if row.difference is not None and row.difference.examples is None]
    if len(without) < len(compared):
        rest = f", except for {', '.join(dict.fromkeys(without))} (seeds alone)" if without else ""
        yield f"Intervals and p count both seeds and test examples as samples{rest}."
    elif compared:
        yield "Intervals and p are over seeds alone: another test set could move all differences together."
    if any(d.p_value is not None and d.detectable is None for d in (row.difference for row in compared) if d):
        yield f"detectable {NONE}: it would be more than 1, the largest difference that there can be."
    if any(d.pairs == 1 and d.examples for d in (row.difference for row in compared) if d is not None):
        yield "p of a single pair: McNemar's exact test over test examples; it says nothing about other seeds."
    if comparison.across_tasks:
        losses = any(is_loss(section.metric) for section in comparison.sections)
        yield (
            f"All tasks together: mean difference{' of logarithms of losses' if losses else ''} with random effects of "
            "task and seed; the interval is for tasks like these. sign-flip: p over the means by seed, for these tasks."
        )


def _marks(comparison: Comparison, rows: list[Row]) -> Iterable[str]:
    repeated = any(len(row.values) > 1 for row in rows)
    rule = "the interval lies beyond every other row's, with at least 3 seeds in each"
    if repeated and any(len(section.rows) > 1 for section in comparison.sections):
        starred = any(row.best for row in rows)
        yield f"{STAR} {rule}." if starred else f"No row is marked best: that needs that {rule}."
    if any(row.bound for row in rows):
        yield f"{BOUND} a bound, found with the test labels: it is not tested."
    if any(row.pareto for row in rows):
        yield f"{PARETO} Pareto front: no other row has a median at least as good at this cost or less."


def _absent(comparison: Comparison) -> Iterable[str]:
    sections = comparison.sections
    if comparison.missing:
        arms = "; ".join(f"{', '.join(names)} on {task}" for task, names in comparison.absent.items())
        none = f" No run of these is finished: {arms}." if arms else ""
        yield f"Missing: {comparison.missing} of the study's {comparison.cells} cells have no finished run.{none}"
    if any(section.others for section in sections):
        yield "Runs that were measured on different examples are in tables of their own: they are not compared."
    if clashes := sum(section.clashes for section in sections):
        yield (
            f"{clashes} of the runs replaced below kept other modules under the same name: "
            "method.chosen_by=NAME tells settings apart."
        )
    left_out = {
        "not finished": comparison.unfinished,
        "without the metric": sum(section.without_metric for section in sections),
        "replaced by a newer run of the same seed": sum(section.repeats for section in sections),
        "in studies, which are compared by their own folders": comparison.in_studies,
    }
    if any(left_out.values()):
        yield f"Left out: {', '.join(f'{runs} {why}' for why, runs in left_out.items() if runs)}."
    yield from (f"Left out as broken: {why}" for why in comparison.broken)
