"""The trials that CI makes, in two files of tests so that two processes share them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_trials(families: Sequence[str], folder: Path) -> None:
    """Make the families' trials, from samples in ``folder``; fails with what they print if one of them failed.

    Families that share a process share its imports and the samples.
    """
    command = [sys.executable, "-m", "tests.reliability", *families, "--samples", str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
