"""A mean over values that share random effects, such as those of a task and of a seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from lowrank_cli.report.statistics.estimates import Estimate, is_flat


def mixed_mean(values: Sequence[float], *groupings: Sequence[Hashable]) -> Estimate | None:
    """Mean of values with crossed random effects, such as of the task and of the seed; cells may be missing.

    The model is ``value = mean + effect of each of its groups + rest``. The variances are fitted by restricted maximum
    likelihood (Patterson and Thompson 1971), the mean by generalized least squares, and the degrees of freedom by
    Satterthwaite's approximation from the expected information (Giesbrecht and Burns 1985).

    Args:
        groupings: for each random effect, the group of each value. One with a single group, or with a group for each
            value, cannot be told from the mean or the rest and is left out.
    """
    import numpy as np
    from scipy.optimize import minimize

    y = np.asarray(values, dtype=float)  # (n,)
    n = len(y)
    if n < 2 or is_flat(y):
        return None
    scale = y.std()
    y = y / scale
    kinds = [np.unique([repr(group) for group in grouping], return_inverse=True)[1] for grouping in groupings]
    kinds = [kind for kind in kinds if 1 < kind.max() + 1 < n]
    shares = [np.eye(n), *((kind[:, None] == kind[None, :]).astype(float) for kind in kinds)]  # each (n, n)

    def inverses(variances: Any) -> tuple[Any, Any, float]:
        """V⁻¹, the projection P that takes out the mean, and var(mean)."""
        inverse = np.linalg.inv(sum(v * share for v, share in zip(variances, shares, strict=True)))
        of_mean = 1 / float(inverse.sum())
        weights = inverse.sum(1)  # (n,)
        return inverse, inverse - of_mean * np.outer(weights, weights), of_mean

    def loss(variances: Any) -> tuple[float, Any]:
        """Restricted -2 log-likelihood without constants, and its gradient."""
        inverse, projection, of_mean = inverses(variances)
        fitted = projection @ y
        value = -np.linalg.slogdet(inverse)[1] - np.log(of_mean) + y @ fitted
        return value, np.array([(projection * share).sum() - fitted @ share @ fitted for share in shares])

    floor = [1e-4] + [0.0] * len(kinds)
    start = np.full(len(shares), 1 / len(shares))
    fit = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(low, None) for low in floor])
    inverse, projection, of_mean = inverses(fit.x)
    mean = of_mean * float(inverse.sum(1) @ y)
    kept = [share for share, variance in zip(shares, fit.x, strict=True) if variance > 1e-6]
    products = [projection @ share for share in kept]
    information = np.array([[(a * b.T).sum() / 2 for b in products] for a in products])
    weights = inverse.sum(1)
    slope = np.array([of_mean**2 * weights @ share @ weights for share in kept])  # of var(mean) in each variance
    df = 2 * of_mean**2 / float(slope @ np.linalg.pinv(information) @ slope)
    return Estimate(float(mean * scale), float(of_mean**0.5 * scale), max(df, 1.0))
