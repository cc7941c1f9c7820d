"""The trials that CI makes, in two files of tests so that two processes share them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_trials(family: str, folder: Path) -> None:
    """Make a family's trials, from samples in ``folder``; fails with what they print if one of them failed."""
    command = [sys.executable, "-m", "tests.reliability", family, "--samples", str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
