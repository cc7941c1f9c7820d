"""The bounded campaign, of which no trial may fail: runs that are killed, stopped, damaged or short of disk."""

import pytest

from .bounded import run_trials


@pytest.mark.slow
@pytest.mark.parametrize("family", ["kills", "mutations", "faults", "stops"])
def test_no_trial_fails(family, tmp_path):
    run_trials(family, tmp_path)
