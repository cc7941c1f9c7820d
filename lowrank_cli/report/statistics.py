"""The two statistics of a comparison over few seeds: an interval for the median and a paired test."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

EXACT_PAIRS = 16  #: up to here all 2^n sign flips are counted
DRAWS = 20_000  #: random sign flips above it


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


def sign_flip_test(differences: Sequence[float]) -> float | None:
    """Two-sided paired permutation test of mean difference 0; None below two pairs.

    Under the null hypothesis each pair's two runs are exchangeable, so every sign pattern of the differences
    is equally likely; p is the share of patterns whose mean is at least as far from 0 as the one seen. Exact
    up to ``EXACT_PAIRS`` pairs, then ``DRAWS`` random patterns from a fixed seed (the one seen counted in).
    The smallest p that ``n`` pairs can give is 2^(1-n): five pairs cannot reach 0.05, six can.
    """
    n = len(differences)
    if n < 2:
        return None
    seen = abs(math.fsum(differences))
    bound = seen - 1e-12 * math.fsum(abs(value) for value in differences)  # rounding must not lose a tie
    if n <= EXACT_PAIRS:
        sums = [differences[0]]  # the first sign stays: flipping all signs changes no absolute sum
        for value in differences[1:]:
            sums = [total + signed for total in sums for signed in (value, -value)]
        return sum(abs(total) >= bound for total in sums) / len(sums)
    draw = random.Random(0)
    flipped = (sum(value if draw.getrandbits(1) else -value for value in differences) for _ in range(DRAWS))
    extreme = sum(abs(total) >= bound for total in flipped)
    return (extreme + 1) / (DRAWS + 1)
