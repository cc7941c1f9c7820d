"""The statistics against brute force, scipy, statsmodels, and simulation."""

from __future__ import annotations

import itertools
import math
import random
import warnings

import numpy as np
import pytest
import scipy.stats

from lowrank_cli.report.statistics import (
    Estimate,
    crossed_mean,
    holm,
    mcnemar,
    median_interval,
    mixed_mean,
    paired_bootstrap,
    paired_mean,
    sign_flip_test,
)
from lowrank_cli.report.statistics.significance import DRAWS


@pytest.mark.parametrize("n", range(1, 30))
def test_median_interval_is_the_narrowest_symmetric_one_that_covers(n):
    def coverage(k):  # of [x_(k), x_(n+1-k)]: the number of values below the median is Binomial(n, 1/2)
        return sum(math.comb(n, i) for i in range(k, n - k + 1)) / 2**n

    low, high = median_interval([float(value) for value in range(1, n + 1)])
    k = int(low)
    assert high == n + 1 - k
    assert coverage(k) >= 0.95 or k == 1
    if k < (n + 1) // 2:
        assert coverage(k + 1) < 0.95


def test_median_interval_of_few_and_unsorted_values():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([0.5]) == (0.5, 0.5)
    values = [0.9, 0.1, 0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8]
    assert median_interval(values) == (0.2, 0.8)  # n = 9: second smallest and second largest cover with 96.1 %


def brute_force(differences):
    n = len(differences)
    seen = abs(sum(differences) / n)
    means = [abs(sum(s * d for s, d in zip(signs, differences)) / n) for signs in itertools.product((1, -1), repeat=n)]
    return sum(mean >= seen - 1e-12 for mean in means) / len(means)


@pytest.mark.parametrize(
    "differences, p",
    [([1.0, 2.0], 0.5), ([1.0, 2.0, 3.0], 0.25), ([0.01] * 6, 2 / 64), ([1.0, -1.0], 1.0), ([0.0, 0.0, 0.0], 1.0)],
)
def test_sign_flip_by_hand(differences, p):
    assert sign_flip_test(differences) == pytest.approx(p)
    assert brute_force(differences) == pytest.approx(p)


def test_sign_flip_equals_brute_force_and_scipy():
    from scipy.stats import permutation_test

    draw = random.Random(3)
    for n in range(2, 11):
        differences = [round(draw.gauss(0.01, 0.02), 3) for _ in range(n)]
        assert sign_flip_test(differences) == pytest.approx(brute_force(differences))
    theirs = permutation_test((differences, [0.0] * n), lambda a, b: (a - b).mean(-1), permutation_type="samples",
                              vectorized=False, n_resamples=2**n)  # fmt: skip
    assert sign_flip_test(differences) == pytest.approx(theirs.pvalue)


def test_sign_flip_needs_two_pairs_and_draws_above_the_exact_range():
    assert sign_flip_test([]) is None
    assert sign_flip_test([1.0]) is None
    draw = random.Random(1)
    differences = [draw.gauss(0.4, 1) for _ in range(18)]
    assert sign_flip_test(differences) == pytest.approx(brute_force(differences), abs=0.01)
    assert sign_flip_test([1.0] * 40) == 1 / (DRAWS + 1)


# Estimates


def values_of(n, seed=0):
    return np.random.default_rng(seed).normal(0.02, 0.03, n).tolist()


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_paired_mean_is_the_paired_t_test(n):
    values = values_of(n)
    theirs, ours = scipy.stats.ttest_1samp(values, 0), paired_mean(values)
    assert ours.p_value() == pytest.approx(theirs.pvalue)
    assert ours.interval() == pytest.approx(tuple(theirs.confidence_interval()))


def test_no_error_from_one_value_or_from_equal_values():
    assert paired_mean([0.1]) is None and paired_mean([0.3 - 0.1, 0.2, 0.2]) is None
    assert crossed_mean(np.full((3, 4), 0.2)) is None
    assert mixed_mean([0.2, 0.2], ["a", "b"]) is None


def crossed(tasks, seeds, of_task, of_seed, rest, seed=0):
    draw = np.random.default_rng(seed)
    table = draw.normal(0, of_task, (tasks, 1)) + draw.normal(0, of_seed, seeds) + draw.normal(0, rest, (tasks, seeds))
    return table + 0.1


def cells(table):
    rows, columns = np.indices(table.shape).reshape(2, -1)
    return table.ravel().tolist(), rows.tolist(), columns.tolist()


def test_mixed_mean_equals_the_closed_form_on_a_complete_table():
    for seed in range(5):
        table = crossed(6, 5, 1.0, 0.7, 0.3, seed)
        closed, fitted = crossed_mean(table), mixed_mean(*cells(table))
        assert fitted.mean == pytest.approx(closed.mean)
        assert fitted.standard_error == pytest.approx(closed.standard_error, rel=1e-3)
        assert fitted.degrees_of_freedom == pytest.approx(closed.degrees_of_freedom, rel=1e-3)


def test_mixed_mean_equals_statsmodels_with_missing_cells():
    regression = pytest.importorskip("statsmodels.regression.mixed_linear_model")
    pandas = pytest.importorskip("pandas")
    for seed in range(3):
        values, tasks, seeds = cells(crossed(5, 6, 1.0, 0.7, 0.3, seed))
        kept = [i for i in range(len(values)) if i not in (0, 7, 13)]
        values, tasks, seeds = ([column[i] for i in kept] for column in (values, tasks, seeds))
        data = pandas.DataFrame({"value": values, "task": tasks, "seed": seeds, "all": 1})
        parts = {"task": "0 + C(task)", "seed": "0 + C(seed)"}
        model = regression.MixedLM.from_formula("value ~ 1", data, groups="all", vc_formula=parts, re_formula="0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # statsmodels on its own internals
            theirs = model.fit(reml=True)
        ours = mixed_mean(values, tasks, seeds)
        assert ours.mean == pytest.approx(theirs.fe_params.iloc[0], abs=1e-4)
        assert ours.standard_error == pytest.approx(theirs.bse_fe.iloc[0], rel=1e-3)


def test_mixed_mean_leaves_out_effects_that_cannot_be_told_apart():
    values = values_of(6)
    one_seed = mixed_mean(values, "aabbcc", [0] * 6)
    assert one_seed == mixed_mean(values, "aabbcc")
    own_seeds = mixed_mean(values, range(6))
    assert own_seeds.standard_error == pytest.approx(paired_mean(values).standard_error, rel=1e-3)


def coverage(estimate, tables):
    inside = [low <= 0.1 <= high for low, high in (estimate(table) for table in tables)]
    return sum(inside) / len(inside)


def test_intervals_over_tasks_and_seeds_cover_and_those_over_pooled_pairs_do_not():
    tables = [crossed(4, 5, 1.0, 0.5, 1.0, seed) for seed in range(200)]
    assert coverage(lambda table: mixed_mean(*cells(table)).interval(), tables) > 0.92
    assert coverage(lambda table: paired_mean(table.ravel()).interval(), tables) < 0.8


# The test set


def right_answers(seeds, examples, of_seed, seed):
    """Differences of right answers of two methods that are equally good."""
    draw = np.random.default_rng(seed)
    hardness, taste = draw.normal(-0.8, 1.0, examples), draw.normal(0, 0.5, examples)
    base = draw.normal(0, 0.7, (seeds, examples))
    luck = draw.normal(0, of_seed, (seeds, 1))
    noise = draw.normal(0, 0.5, (2, seeds, examples))
    first, second = base + luck + taste / 2 + noise[0] > hardness, base - taste / 2 + noise[1] > hardness
    return first.astype(float) - second


def test_intervals_over_seeds_and_examples_cover_and_the_bootstrap_of_few_seeds_does_not():
    tables = [right_answers(3, 200, 0.6, seed) + 0.1 for seed in range(200)]
    assert coverage(lambda table: crossed_mean(table).interval(), tables) > 0.9
    assert coverage(lambda table: paired_bootstrap(table, resamples=300), tables) < 0.85


def test_the_bootstrap_is_that_of_drawing_seeds_then_examples():
    table = right_answers(4, 30, 0.1, seed=1)
    draw, means = np.random.default_rng(5), []
    for _ in range(4000):
        seeds, examples = draw.integers(4, size=4), draw.integers(30, size=30)
        means.append(table[np.ix_(seeds, examples)].mean())
    assert paired_bootstrap(table) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    assert paired_bootstrap(table) == paired_bootstrap(table)


def test_of_many_seeds_the_bootstrap_agrees_with_the_closed_form():
    table = right_answers(40, 400, 0.2, seed=2)
    assert paired_bootstrap(table) == pytest.approx(crossed_mean(table).interval(), abs=0.01)


@pytest.mark.parametrize("first, second", [(8, 2), (1, 9), (5, 5), (0, 3), (0, 0)])
def test_mcnemar_is_the_binomial_test_of_discordant_examples(first, second):
    table = np.array([[1.0] * first + [-1.0] * second + [0.0] * 7])
    expected = scipy.stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(table) == pytest.approx(expected)


# Several tests, and what a test can find


@pytest.mark.parametrize("p_values", [[], [0.04], [0.01, 0.04, 0.03, 0.005], [0.5, 0.5, 0.9], [0.02, 0.02, 0.02]])
def test_holm(p_values):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    expected = multitest.multipletests(p_values, method="holm")[1] if p_values else []
    assert holm(p_values) == pytest.approx(expected)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])


@pytest.mark.parametrize("n", [2, 3, 5, 20, 500])
def test_detectable_equals_statsmodels(n):
    power = pytest.importorskip("statsmodels.stats.power")
    effect = power.TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
    estimate = Estimate(mean=0.0, standard_error=3.0 / n**0.5, degrees_of_freedom=n - 1)
    assert estimate.detectable() == pytest.approx(3.0 * effect, rel=1e-4)


def test_the_detectable_difference_is_found_with_80_percent_power():
    spread, n = 0.03, 6
    true = Estimate(0.0, spread / n**0.5, n - 1).detectable()
    samples = np.random.default_rng(0).normal(true, spread, (4000, n))
    found = scipy.stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)
