"""The studies in conf/study/ name methods, tasks and settings that exist."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest

from lowrank_cli.config.composition import compose
from lowrank_cli.config.folders import files
from lowrank_cli.launch.study_plan import Cell, Plan, require_plain

FOLDER = Path(tempfile.gettempdir()).resolve()  #: nothing is read from it


@cache
def plan(name: str) -> Plan:
    """A study whose folders lie in ``FOLDER``."""
    config = compose("study", [f"study={name}"]).config.study
    config.folders = dict.fromkeys(config.folders, str(FOLDER))
    return Plan(config, FOLDER)


def cells(name: str) -> list[Cell]:
    """The baseline on every task, and every arm on the first task of all."""
    study = plan(name)
    first = next(study.cells())
    place = (first.group, first.task)
    return [cell for cell in study.cells() if cell.arm == study.config.baseline or (cell.group, cell.task) == place]


FEW = [(name, cell) for name in files("study") for cell in cells(name)]


@pytest.mark.parametrize(("name", "cell"), FEW, ids=lambda value: str(value).replace("/", "-"))
def test_a_cell_composes(name, cell):
    study = plan(name)
    for job in (*(study.step(cell.group, step, 0) for step in study.steps(cell.group)), study.run(cell, {}, 0)):
        if not any(word.startswith("run=") for word in job.overrides):
            config = compose(job.verb, list(job.overrides), later=(str(FOLDER),)).config
            assert config.seed % 10 == 0


@pytest.mark.parametrize("name", files("study"))
def test_a_study_holds_together(name):
    study = plan(name)
    require_plain(study.config)
    assert study.config.name == name and len(study.config.seeds) >= 5
