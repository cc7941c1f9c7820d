"""The bounded campaign, of which no trial may fail: runs that are killed, stopped, damaged or short of disk."""

import pytest

from .bounded import run_trials


@pytest.mark.slow
@pytest.mark.parametrize("families", [["mutations", "kills"], ["faults", "stops"]], ids=" ".join)
def test_no_trial_fails(families, tmp_path):
    run_trials(families, tmp_path)
