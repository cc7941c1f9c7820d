"""Intervals that assume no distribution: of a median, and of a difference by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 4000  #: of the bootstrap
NORMAL_95 = 1.959964  #: quantile of the normal distribution for a two-sided 95 %
CHUNK = 500  #: resamples computed at once; bounds the memory to a few arrays of CHUNK × examples


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the median from order statistics.

    The median lies below the k-th smallest of ``n`` values with probability P(Binomial(n, 1/2) < k), so
    [x_(k), x_(n+1-k)] with the largest k that keeps both tails within ``1 - confidence`` covers it. Below six
    values no k does (two-sided 95 %): the interval is then their range, which covers the median with
    probability 1 - 2^(1-n): 75 % for three, 87.5 % for four, 93.75 % for five.
    """
    assert values, "an interval needs a value"
    ordered, n = sorted(values), len(values)
    k, below = 0, 1  # below = 2^n · P(Binomial(n, 1/2) <= k)
    while 2 * below <= (1 - confidence) * 2**n:
        k += 1
        below += math.comb(n, k)
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a probability, of which ``share`` was seen in ``n`` trials (Wilson 1927)."""
    assert n > 0, "an interval needs a trial"
    z = NORMAL_95**2 / n
    middle, half = share + z / 2, math.sqrt(z * share * (1 - share) + z * z / 4)
    return (middle - half) / (1 + z), (middle + half) / (1 + z)


def paired_bootstrap(table: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``table`` over random seeds *and* test examples.

    A resample draws seeds with replacement, then examples with replacement, and takes the mean over the cells drawn:
    the pigeonhole bootstrap (Owen 2007), as every seed answers the same examples. Pairs stay together, since a cell is
    a difference already. The cost is resamples · seeds · examples multiplications: 0.05 s for 5 seeds and 1,000
    examples.

    Resampled seeds vary less than seeds, by the factor 1 - 1/seeds, and percentiles know no Student's t, so with few
    seeds the interval is too short: in simulations it covers 78 % for three seeds, 88 % for five, 92 % for ten, where
    those of :func:`lowrank_cli.report.statistics.crossed_mean` cover 92 to 96 %.

    Args:
        table: difference of the scores of two methods, seeds × examples.
    """
    import numpy as np

    seeds, examples = table.shape
    draw = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - start)
        shares = draw.multinomial(seeds, [1 / seeds] * seeds, size=count) / seeds  # (count, seeds)
        drawn = draw.integers(examples, size=(count, examples))
        means.append(np.take_along_axis(shares @ table, drawn, axis=1).mean(1))  # (count,)
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
