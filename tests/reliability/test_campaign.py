"""The bounded campaign: some trials of each family, none of which may fail."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return tmp_path_factory.mktemp("samples")


@pytest.mark.parametrize("family", ["kills", "mutations", "configurations", "data", "faults", "given", "stops"])
def test_no_trial_fails(family, samples):
    command = [sys.executable, "-m", "tests.reliability", family, "--samples", str(samples)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
