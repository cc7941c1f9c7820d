"""What ``lrk`` prints is as recorded, and run folders of earlier versions can be read; see ``tests/golden``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from golden import transcripts
from golden.command import call

SMALL = "hardware.threads=1"


def transcript(file: Path) -> object:
    slow = file.stem.startswith("errors") or file.stem in ("check", "dry_run_recipe")
    return pytest.param(file, id=file.stem, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize("file", [*map(transcript, transcripts.FILES)])
def test_what_commands_print(file, tmp_path):
    difference = transcripts.check(file, tmp_path / "work")
    assert not difference, f"{difference}\n\nIf that is meant: python -m tests.golden renew {file.stem}"


@pytest.fixture
def kept_runs():
    """The run folders of an earlier version, and the groups that they were made with, in the working directory."""
    shutil.copytree(transcripts.FOLDER / "given", ".", dirs_exist_ok=True)
    shutil.copytree(transcripts.FOLDER / "runs", "runs")


def metrics(run: str) -> dict[str, float]:
    return json.loads(Path(run, "metrics.json").read_text())


def done(*arguments: str) -> Path:
    """The run folder of ``lrk ARGUMENTS``."""
    ended = call(*arguments, "outputs=outputs")
    assert ended.code == 0, ended.err
    return Path("outputs/latest").resolve()


@pytest.mark.parametrize("run", ["runs/lora", "runs/idaicl", "runs/recipe/01-train", "runs/recipe/03-prune"])
def test_a_kept_adapter_has_its_metrics(kept_runs, run):
    before = metrics(run)
    for split in ("dev", "test"):
        now = metrics(done("evaluate", f"run={run}", f"evaluate.split={split}"))
        shared = before.keys() & now.keys()
        assert f"{split}/accuracy" in shared
        assert {key: now[key] for key in shared} == pytest.approx({key: before[key] for key in shared}, rel=1e-4)


def test_a_kept_adapter_goes_through_every_verb(kept_runs):
    scored = done("score", "run=runs/recipe/01-train", "score.batch=4", SMALL)
    before, now = (json.loads(Path(run, "scores.json").read_text()) for run in ("runs/recipe/02-score", scored))
    assert [module["module"] for module in now["modules"]] == [module["module"] for module in before["modules"]]
    for module, kept in zip(now["modules"], before["modules"]):
        assert module["scores"] == pytest.approx(kept["scores"], abs=1e-4)  # differences of losses near 6.5
    pruned = done("prune", "run=runs/recipe/02-score", "prune.drop=3")
    kept, now = (Path(run, "adapter/adapter_config.json").read_text() for run in ("runs/recipe/03-prune", pruned))
    assert json.loads(now)["target_modules"] == json.loads(kept)["target_modules"]
    assert (done("export", "run=runs/lora") / "export" / "adapter_model.safetensors").is_file()
    assert done("generate", "run=runs/lora", "Is zorp red?", "generate.max_new_tokens=4")
    assert done("train", "run=runs/recipe/03-prune", "train.max_steps=1", "train.epochs=1")


def test_a_kept_unfinished_run_is_continued(kept_runs):
    begun = Path("runs/unfinished/history.jsonl").read_text().splitlines()
    assert call("train", "--resume", "runs/unfinished").code == 0
    assert Path("runs/unfinished/history.jsonl").read_text().splitlines()[: len(begun)] == begun
    assert metrics("runs/unfinished")["train/steps"] == 40


@pytest.mark.parametrize(("verb", "folder"), [(["train", "-m"], "runs/sweep"), (["run"], "runs/recipe")])
def test_a_kept_sweep_and_a_kept_recipe_are_continued(kept_runs, verb, folder):
    """Their last job diverges, and does so again."""
    ended = call(*verb, "--resume", folder)
    assert ended.code == 1 and "train/loss is nan at step 2" in ended.err
