"""Breaks a training off and resumes it, for tests that compare it with an unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank_cli.errors import WorkFailed
from lowrank_cli.launch import single_run
from lowrank_cli.runs import Run
from lowrank_cli.stages.train import Trainer


def train_broken_at(step: int, overrides: list[str]) -> Run:
    """A training that fails at ``step`` and is resumed to its end."""
    take_step = Trainer.take_step

    def failing(trainer: Trainer, number: int) -> float:
        if number == step:
            raise WorkFailed("the power went out")
        return take_step(trainer, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "take_step", failing)
        with pytest.raises(WorkFailed, match="the power went out"):
            single_run.start("train", overrides, None, "lrk train")
    broken = Run.open(Path("outputs/latest").resolve())
    single_run.resume("train", str(broken.path))
    return Run.open(broken.path)


def history(run: Run) -> list[dict[str, Any]]:
    """history.jsonl without the times."""
    return [{key: value for key, value in row.items() if key != "train/seconds"} for row in run.history()]
