"""Calls the command line in this process, with stages that need no model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank_cli import cli, stages
from lowrank_cli.launch import workers
from lowrank_cli.runs import Run, config_hash

FAKES = Path(__file__).parent / "fakes"
ROOT = Path(__file__).resolve().parents[1]

#: A few small steps of the bundled model.
FEW_STEPS = [
    "task=tiny_sentiment",
    "task.limit=24",
    "hardware.threads=1",
    "train.max_steps=6",
    "train.batch_size=8",
    "train.log_every=1",
    "train.eval_every=2",
    "train.checkpoint_every=2",
]

#: Four, with checkpoints on the way.
FOUR_STEPS = [
    "task=tiny_entailment",
    "task.limit=16",
    "hardware.threads=1",
    "train.max_steps=4",
    "train.batch_size=8",
    "train.log_every=1",
    "train.eval_every=2",
    "train.checkpoint_every=2",
]


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def lrk(capfd, monkeypatch):
    """``lrk("train", "seed=1")`` as the shell would see it."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["lrk", *arguments])
        capfd.readouterr()
        try:
            code = cli.call(list(arguments))
        except SystemExit as ended:  # after a completion
            code = int(ended.code or 0)
        return Ended(code, *capfd.readouterr())

    return call


@pytest.fixture
def fake_stages(monkeypatch):
    """Every verb runs tests/fakes/fake_stage.py, in this process and in those it starts."""
    own = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), str(ROOT), *([own] if own else [])]))
    monkeypatch.syspath_prepend(str(FAKES))
    for verb in ("train", "score", "prune", "evaluate"):
        monkeypatch.setitem(stages.STAGES, verb, "fake_stage")
    monkeypatch.setattr(workers, "PRELOADED", ("fake_stage", "lowrank_cli.report.plots"))  # no torch: that takes 5 s


def shell(*arguments: str, **environment: str) -> Ended:
    """``python -m lowrank_cli`` in a process of its own, with nothing heavy to import."""
    light = Path("light")
    light.mkdir(exist_ok=True)
    for name in ("torch", "transformers", "datasets", "accelerate", "evaluate", "matplotlib", "scipy"):
        (light / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')\n")
    path = os.pathsep.join([str(light.resolve()), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **environment}
    command = [sys.executable, "-m", "lowrank_cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    shutil.rmtree(light)
    return Ended(done.returncode, done.stdout, done.stderr)


def one_line(ended: Ended) -> str:
    """The message of a user's mistake: one line on stderr, exit code 2, nothing written."""
    assert (ended.code, ended.out) == (2, ""), ended
    assert ended.err.startswith("error: ") and ended.err.endswith("\n") and ended.err.count("\n") == 1, ended.err
    assert not Path("outputs").exists()
    return ended.err.removeprefix("error: ").rstrip("\n")


def reconfigure(run: Run, /, **changes: Any) -> None:
    """Change top-level keys of a saved configuration, as if that had run."""
    config = run.config() | changes
    run.write_text("config.yaml", yaml.safe_dump(config, sort_keys=False))
    run.update(config_hash=config_hash(config))


def runs() -> list[Path]:
    """Run folders under outputs, in the order they were made."""

    def made(path: Path) -> tuple[str, str, str]:
        file = path / "run.json"  # a sweep has none, and takes longer to start than a run of the same second
        started = json.loads(file.read_text())["started"] if file.is_file() else "later"
        return path.parent.name, path.name[:6], started

    return sorted((path for path in Path("outputs").glob("*/*") if path.parent.name != "latest"), key=made)
