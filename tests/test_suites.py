"""The suites of experiments in scripts/research/suites name methods, tasks and settings that exist."""

from pathlib import Path

import pytest
import yaml

from lowrank_cli.config.composition import compose

SUITES = sorted((Path(__file__).parents[1] / "scripts" / "research" / "suites").glob("*.yaml"))
CELLS = {
    f"{file.stem}-{group}-{method}": (suite, group, method)
    for file in SUITES
    for suite in [yaml.safe_load(file.read_text())]
    for group in suite["groups"]
    for method in suite["methods"]
}


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_of_a_suite_composes(cell, tmp_path):
    suite, name, method = CELLS[cell]
    group = suite["groups"][name]
    steps = group.get("prepare", {}) | suite.get("prepare", {})
    given = dict.fromkeys(["encoder", "data", "pairs", *steps], str(tmp_path)) | {"seed": "0"}
    settings = [text.format(**given) for text in (*suite["methods"][method], *group.get("methods", {}).get(method, []))]
    for overrides in list(group["tasks"].values())[: None if method == suite["baseline"] else 1]:
        overrides = overrides[method] if isinstance(overrides, dict) else overrides
        asked = [text.format(**given) for text in (*group["overrides"], *overrides)]
        config = compose("train", [*asked, *settings, "seed=0"], later=(str(tmp_path),)).config
        assert config.train.max_steps is not None


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_a_suite_s_baseline_and_tuned_task_are_its_own(file):
    suite = yaml.safe_load(file.read_text())
    assert suite["baseline"] in suite["methods"] and len(suite["seeds"]) >= 5
    for group in suite["groups"].values():
        assert group.get("tune", {}).get("task") in {None, *group["tasks"]}
        assert set(group.get("methods", {})) <= set(suite["methods"])
    for members in suite.get("pools", {}).values():
        assert set(members) <= set(suite["methods"])
