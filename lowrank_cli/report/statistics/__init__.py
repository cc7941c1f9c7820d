"""The statistics of comparisons: estimates with their errors, intervals, tests, and corrections."""

from lowrank_cli.report.statistics.estimates import Estimate, crossed_mean, paired_mean
from lowrank_cli.report.statistics.intervals import median_interval, paired_bootstrap
from lowrank_cli.report.statistics.mixed import mixed_mean
from lowrank_cli.report.statistics.significance import holm, mcnemar, sign_flip_test

__all__ = [
    "Estimate",
    "crossed_mean",
    "holm",
    "mcnemar",
    "median_interval",
    "mixed_mean",
    "paired_bootstrap",
    "paired_mean",
    "sign_flip_test",
]
