"""The bounded campaign, of which no trial may fail: what users type and data that they bring."""

import pytest

from .bounded import run_trials


@pytest.mark.slow
@pytest.mark.parametrize("families", [["configurations"], ["data", "given"]], ids=" ".join)
def test_no_trial_fails(families, tmp_path):
    run_trials(families, tmp_path)
