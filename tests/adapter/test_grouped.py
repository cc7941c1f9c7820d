"""The kernels of the grouped update compute what torch does: here in Triton's interpreter, on a GPU in test_gpu."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import grouped_cases
import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which torch for CPUs comes without")
def test_the_kernels_compute_what_torch_does():
    ran = subprocess.run(
        [sys.executable, grouped_cases.__file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
