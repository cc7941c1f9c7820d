"""Fills in what a comparison says of its rows: differences from the baseline, the best row, Pareto fronts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from lowrank_cli.errors import UserError, unknown
from lowrank_cli.report.comparison import COSTS, Difference, Row, Section, priced, swept
from lowrank_cli.report.metric_names import is_share
from lowrank_cli.report.predictions import Answers, answers
from lowrank_cli.report.statistics import (
    crossed_mean,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_mean,
    sign_flip_test,
)

if TYPE_CHECKING:
    import numpy as np

MIN_SEEDS = 3  #: of every row, for one of them to be marked best


def mark_best(section: Section) -> None:
    """Mark the first row if its interval is beyond that of every other, and all have enough seeds."""
    rows = [row for row in section.rows if not (row.pool or row.bound)]
    if len(rows) < 2 or any(len(row.values) < MIN_SEEDS for row in rows):
        return
    first, *others = rows
    lower = section.lower_is_better
    first.best = all(first.high < row.low if lower else first.low > row.high for row in others)


def mark_pareto(section: Section) -> None:
    """Note for each row the costs by which no other row has a median at least as good at the same cost or less."""
    sign = -1 if section.lower_is_better else 1

    def points(cost: str) -> list[tuple[Row, float, float]]:
        known = [(row, getattr(row, cost)) for row in priced(section)]
        return [(row, sign * row.median, value) for row, value in known if value is not None]

    fronts = {cost: pareto_front(points(cost)) for cost in COSTS}
    for row in section.rows:
        row.pareto = tuple(cost for cost, front in fronts.items() if any(row is other for other in front))


def pareto_front(points: Sequence[tuple[Row, float, float]]) -> list[Row]:
    """Of (row, quality, cost), the rows that none beats in one without being worse in the other; none if only one."""
    if len(points) < 2:
        return []
    return [
        row
        for row, quality, cost in points
        if not any(q >= quality and c <= cost and (q, c) != (quality, cost) for _, q, c in points)
    ]


def compare_with_baseline(sections: Sequence[Section], baseline: str) -> None:
    """Fill in each row's difference from the baseline's row of its section.

    If the baseline has several rows, that is the one of the same setting or of the same swept number (such as rank).

    Raises:
        UserError: no row has this name, or several rows could be the baseline.
    """
    rows = [row for section in sections for row in section.rows]
    labels = dict.fromkeys([*(row.method for row in rows), *(row.label for row in rows)])
    if baseline not in labels:
        raise unknown("--baseline", baseline, labels)
    for section in sections:
        candidates = [row for row in section.rows if baseline in (row.method, row.label)]
        _, numbers = swept(section.rows)
        for row in section.rows:
            same = [other for other in candidates if other.setting == row.setting]
            if not same and row.label in numbers:
                same = [other for other in candidates if numbers.get(other.label) == numbers[row.label]]
            same = same or [other for other in candidates if other.label == baseline] or candidates
            if len(same) > 1:
                raise _several(baseline, (other.label for other in same))
            if same and same[0] is not row:
                row.baseline = same[0]
                row.difference = difference(row, same[0], section.metric)
        _correct_for_several(section.rows)
    for section in sections if all(row.baseline is None for row in rows) else ():
        if len(section.rows) > 1:
            raise _several(baseline, (row.label for row in section.rows if row.method == baseline))


def _several(baseline: str, labels: Iterable[str]) -> UserError:
    named = "; ".join(f"'{label}'" for label in dict.fromkeys(labels))
    return UserError(f"--baseline: '{baseline}' has several settings; name one of: {named}")


def difference(row: Row, baseline: Row, metric: str) -> Difference | None:
    """The difference of two rows over the seeds that both have; None without such a seed."""
    by_seed = paired(row, baseline)
    if not by_seed:
        return None
    differences = list(by_seed.values())
    if row.bound:
        return Difference(fmean(differences), len(differences), None)
    table = _answers_table(row, baseline, list(by_seed), metric)
    examples = None if table is None else table.shape[1]
    result = Difference(fmean(differences), len(differences), examples, sign_flip=sign_flip_test(differences))
    estimate = paired_mean(differences) if table is None else crossed_mean(table)
    if estimate is not None:
        result.low, result.high = estimate.interval()
        result.p_value, detectable = estimate.p_value(), estimate.detectable()
        result.detectable = None if is_share(metric) and detectable > 1 else detectable
    if table is not None:
        result.bootstrap = paired_bootstrap(table)
        if len(differences) == 1 and not (row.pool or baseline.pool):
            result.p_value = mcnemar(table)
    return result


def paired(row: Row, baseline: Row) -> dict[int, float]:
    """Seed → difference, for the seeds that both rows have."""
    shared = sorted(row.values.keys() & baseline.values.keys())
    return {seed: row.values[seed] - baseline.values[seed] for seed in shared}


def _answers_table(row: Row, baseline: Row, seeds: Sequence[int], metric: str) -> np.ndarray | None:
    """Differences of right answers, seeds × examples; None unless all runs answered the same examples."""
    import numpy as np

    lines, questions = [], set()
    for seed in seeds:
        sides = []
        for side in (row, baseline):
            runs = _answers_of(side, seed, metric)
            if runs is None:
                return None
            questions |= {one.questions for one in runs}
            sides.append(np.mean([one.correct for one in runs], axis=0))  # (examples,)
            if len(questions) > 1:
                return None
        lines.append(sides[0] - sides[1])
    return np.stack(lines)  # (seeds, examples)


def _answers_of(row: Row, seed: int, metric: str) -> list[Answers] | None:
    """The answers of a run, or of each run of a pool."""
    folders = row.answers.get(seed, [])
    values = row.pool_values[seed] if row.pool else [row.values[seed]]
    if len(folders) != len(values):
        return None
    runs = [answers(folder, metric, value, row.view) for folder, value in zip(folders, values, strict=True)]
    known = [one for one in runs if one is not None]
    return known if len(known) == len(runs) else None


def _correct_for_several(rows: Iterable[Row]) -> None:
    """Fill in the p-values corrected for being several."""
    tested = [row.difference for row in rows if row.difference is not None and row.difference.p_value is not None]
    for one, corrected in zip(tested, holm([one.p_value or 0.0 for one in tested]), strict=True):
        one.p_holm = corrected
