"""The statistics of comparisons: estimates with their errors, intervals, tests, and corrections."""

from lowrank_cli.report.statistics.estimates import Estimate, crossed_mean, paired_mean
from lowrank_cli.report.statistics.intervals import NORMAL_95, median_interval, paired_bootstrap, wilson_interval
from lowrank_cli.report.statistics.mixed import mixed_mean
from lowrank_cli.report.statistics.significance import holm, mcnemar, sign_flip_test

__all__ = [
    "NORMAL_95",
    "Estimate",
    "crossed_mean",
    "holm",
    "mcnemar",
    "median_interval",
    "mixed_mean",
    "paired_bootstrap",
    "paired_mean",
    "sign_flip_test",
    "wilson_interval",
]
