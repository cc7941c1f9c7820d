"""A mean difference with its error: over seeds, over seeds and examples of one test set, over tasks and seeds.

Each function returns an :class:`Estimate`, or None where the values cannot give one: a single value, or values
without any spread, from which no error can be estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

POWER = 0.8  #: of the test that :meth:`Estimate.detectable` speaks of, Cohen 1988, section 2.4
LEVEL = 0.05  #: of all tests and intervals, two-sided


@dataclass(frozen=True)
class Estimate:
    """A mean whose error follows Student's t, exactly or by Satterthwaite's approximation."""

    mean: float
    standard_error: float
    degrees_of_freedom: float

    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval."""
        from scipy.special import stdtrit

        half = float(stdtrit(self.degrees_of_freedom, 1 - LEVEL / 2)) * self.standard_error
        return self.mean - half, self.mean + half

    def p_value(self) -> float:
        """Two-sided p of mean 0; below 0.05 exactly where the interval excludes 0."""
        from scipy.special import stdtr

        return 2 * float(stdtr(self.degrees_of_freedom, -abs(self.mean) / self.standard_error))

    def detectable(self) -> float:
        """The true mean that this test would have found with probability ``POWER``, given the error seen.

        The test statistic of a true mean ``m`` follows the noncentral t with noncentrality m / standard error.
        """
        from scipy.optimize import brentq
        from scipy.special import nctdtr, stdtrit

        df = self.degrees_of_freedom
        critical = float(stdtrit(df, 1 - LEVEL / 2))

        def missing_power(noncentrality: float) -> float:
            """On the side of the true mean; the other adds less than 10⁻⁵ where the power is 80 %."""
            return float(nctdtr(df, noncentrality, critical)) - (1 - POWER)

        return float(brentq(missing_power, 0.0, 2 * critical + 5)) * self.standard_error


def paired_mean(differences: Sequence[float]) -> Estimate | None:
    """Mean of the differences of pairs, such as two methods' runs of one seed: Student's paired t."""
    import numpy as np

    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or is_flat(values):
        return None
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5, len(values) - 1)


def crossed_mean(table: np.ndarray) -> Estimate | None:
    """Mean of a complete table whose rows and columns are both random samples: seeds × examples of the test set.

    All seeds answer the same examples, so example effects do not average out over seeds, nor seed effects over
    examples. From the mean squares of rows, columns and their interaction (two-way random effects without
    replication; Searle, Casella and McCulloch 1992, section 4.3)

        var(mean) = (MS_rows + MS_columns - MS_interaction) / (rows · columns),

    where a mean square below the interaction's is replaced by it (a variance is not negative), with degrees of
    freedom by Satterthwaite 1946. With one row or one column it is :func:`paired_mean`.
    """
    import numpy as np

    rows, columns = table.shape
    if min(rows, columns) == 1:
        return paired_mean(table.ravel().tolist())
    mean, by_row, by_column = table.mean(), table.mean(1), table.mean(0)
    rest = table - by_row[:, None] - by_column[None, :] + mean  # (rows, columns)
    freedom = np.array([rows - 1, columns - 1, (rows - 1) * (columns - 1)])
    squares = [columns * ((by_row - mean) ** 2).sum(), rows * ((by_column - mean) ** 2).sum(), (rest**2).sum()]
    of_rows, of_columns, interaction = np.array(squares) / freedom
    terms = np.array([max(of_rows, interaction), max(of_columns, interaction), -interaction])
    variance = terms.sum() / table.size
    if variance <= 0 or is_flat(table):
        return None
    df = terms.sum() ** 2 / (terms**2 / freedom).sum()
    return Estimate(float(mean), float(variance**0.5), max(float(df), 1.0))


def is_flat(values: np.ndarray) -> bool:
    """Whether the values differ by rounding alone."""
    return float(values.max() - values.min()) <= 1e-12 * float(abs(values).max())
