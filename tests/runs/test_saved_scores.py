"""``scores.json``: one class writes and reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_cli.errors import UserError
from lowrank_cli.runs import Run
from lowrank_cli.runs.scores import FILE, SavedScores

OLD = Path(__file__).parents[1] / "golden" / "runs" / "recipe" / "02-score"
MODULE = {"module": "layers.0.q_proj", "layer": 0, "role": "Q", "scores": [1.5], "without": [-3.0], "alone": [-4.0]}


def written(**changes) -> Path:
    """A run folder with scores, of which ``changes`` replace what the class writes; None takes a key out."""
    run = Run(Path("run"), {})
    run.path.mkdir()
    SavedScores(level="module", kind="ablation", modules=[MODULE], whole=-2.0, bare=-4.5).save(run)
    record = json.loads((run.path / FILE).read_text()) | changes
    run.write_json(FILE, {key: value for key, value in record.items() if value is not None})
    return run.path


def test_what_is_saved_is_read():
    scores = SavedScores.read(written())
    assert scores == SavedScores(level="module", kind="ablation", modules=[MODULE], whole=-2.0, bare=-4.5)
    assert json.loads(Path("run", FILE).read_text())["meaning"].keys() == {
        *("scores", "whole", "bare", "without", "alone")
    }


def test_scores_of_earlier_versions_are_read_and_written_alike():
    old = SavedScores.read(OLD)
    assert (old.level, old.kind, old.reason) == ("rank", "ab", "")
    run = Run(Path("run"), {})
    run.path.mkdir()
    old.save(run)
    assert (run.path / FILE).read_text() == (OLD / FILE).read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "layer"}, "level is 'layer'; expected one of rank, module"),
        ({"kind": 3}, r"kind is 3; expected a kind of score \(lrk list keys score\)"),
        ({"modules": None}, "modules is missing; expected a list"),
        ({"modules": [{**MODULE, "scores": ["a"]}]}, r"modules\[0\].scores\[0\] is 'a'; expected a finite number"),
        ({"modules": [{**MODULE, "alone": None}]}, r"modules\[0\].alone is null; expected a list"),
        ({"bare": "low"}, "bare is 'low'; expected a finite number or null"),
    ],
)
def test_scores_that_do_not_fit_are_one_line(changes, message):
    with pytest.raises(UserError, match=rf"^run/scores\.json: {message}"):
        SavedScores.read(written(**changes))
