"""Tests that assume no distribution, and the correction for making several tests."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

EXACT_PAIRS = 16  #: up to here all 2^n sign flips are counted
DRAWS = 20_000  #: random sign flips above it


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


def mcnemar(table: np.ndarray) -> float:
    """Exact two-sided p of McNemar 1947 for two single runs; other seeds could give another answer.

    Of the examples that one run answers rightly and the other wrongly, each is as likely to favour either run.

    Args:
        table: +1 where only the first run is right, -1 where only the second is, else 0; 1 × examples.
    """
    from scipy.special import bdtr

    first, second = int((table > 0).sum()), int((table < 0).sum())
    return min(1.0, 2 * float(bdtr(min(first, second), first + second, 0.5))) if first + second else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for being several, in the same order (Holm 1979).

    The chance that any true null hypothesis has a corrected p below 0.05 is at most 5 %, however the tests depend on
    each other. The k-th smallest of n is multiplied by n - k + 1; none is smaller than those before it, none above 1.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
