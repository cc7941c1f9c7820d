"""The script for a day with a GPU: its commands compose, and what a part did is kept whatever the next one does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "research"))

import gpu_day
from gpu_day import Part

from lowrank_cli.config.composition import compose


@pytest.mark.parametrize("dry", [True, False], ids=["cpu", "gpu"])
def test_every_part_is_a_command(tmp_path, dry):
    (tmp_path / "kept.yaml").write_text("layers: {all: [V, D]}\n")
    benches = [part.command[3:] for part in gpu_day.parts(tmp_path, dry) if part.command[2] == "lowrank_cli"]
    assert len(benches) == 6
    for verb, kind, *overrides in benches:
        compose(verb, [f"bench={kind}", *overrides], None)


def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path):
    def part(name, code, limit=30.0, missing=""):
        return Part(name, [sys.executable, "-c", code], limit, missing)

    hangs = part("hangs", "import time; print('begun', flush=True); time.sleep(60)", 1.0)
    given = [part("fails", "1/0"), hangs, part("none", "", missing="no GPU"), part("works", "print('fine')")]
    results = gpu_day.measure(given, tmp_path, 60)
    statuses = ["failed", "timed out", "skipped", "done"]
    assert [result.status for result in results] == statuses
    assert [result.note for result in results] == ["ZeroDivisionError: division by zero", "begun", "no GPU", "fine"]
    saved = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [result["status"] for result in saved] == statuses


@pytest.mark.skipif(not os.environ.get("LRK_GPU_DAY"), reason="two minutes; set LRK_GPU_DAY=1")
def test_all_parts_run_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "--dry", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu_day.main()
    results = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert not ended.value.code
    assert {result["name"] for result in results if result["status"] != "done"} == {"tenants_triton"}
    assert (tmp_path / "steps.png").is_file() and (tmp_path / "tenants.png").is_file()
