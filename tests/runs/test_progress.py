"""The progress bar on narrow and wide terminals."""

from __future__ import annotations

import io
import re
import sys

import pytest

from lowrank_cli.runs import progress
from lowrank_cli.terminal import Terminal


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_on_the_line_is_cut_off(width, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress, "console", lambda: Terminal(stderr=True, force_terminal=True, width=width))
    with progress.bar("training", 26_880, shown=True) as bar:
        bar.expect(120)
        bar.note("loss 12.572, best dev 10.107 at 22200")
        bar.advance(11)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).replace("\r", "\n").splitlines()
    last = [line for line in lines if "/27000" in line][-1]
    assert "…" not in last and len(last.rstrip()) <= width and "11/27000" in last
    assert ("at 22200" in last) == (width >= 80)
