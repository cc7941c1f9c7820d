"""The bounded campaign, of which no trial may fail: what users type and data that they bring."""

import pytest

from .bounded import run_trials


@pytest.mark.slow
@pytest.mark.parametrize("family", ["configurations", "data", "given"])
def test_no_trial_fails(family, tmp_path):
    run_trials(family, tmp_path)
