"""What encoders answer besides one label: a number, any of several labels, a tag for each word."""

import json
import random
from pathlib import Path

import pytest
import yaml
from checkpoints import random_bert

from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run, stage
from lowrank_cli.runs import Run

KINDS = {"good": 5, "fine": 4, "dull": 1, "bad": 0}  #: words and their numbers
TASKS = {
    "number": {"metric": "pearson", "more_metrics": ["spearman", "mse"]},
    "multi_label": {"metric": "micro_f1", "label_words": list(KINDS)},
    "tags": {"metric": "entity_f1", "label_words": ["O", "B-GOOD", "B-BAD"]},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return random_bert(tmp_path_factory.mktemp("encoder"))


def rows(answer: str, count: int, seed: int) -> list[dict]:
    found, rng = [], random.Random(seed)
    for _ in range(count):
        words = rng.choices(list(KINDS), k=2)
        values = {
            "number": 300 + 20 * sum(KINDS[word] for word in words),
            "multi_label": sorted(set(words)),
            "tags": ["B-GOOD" if KINDS[word] > 2 else "B-BAD" for word in words],
        }
        found.append({"text": words if answer == "tags" else " ".join(words), "y": values[answer]})
    return found


def written(folder: Path, answer: str) -> list[str]:
    """Overrides of a task with data of this kind in ``folder``."""
    data, group = folder / "data", folder / "conf" / "task"
    data.mkdir()
    group.mkdir(parents=True)
    for seed, (split, count) in enumerate({"train": 128, "dev": 16, "test": 32}.items()):
        lines = (json.dumps(row) + "\n" for row in rows(answer, count, seed))
        (data / f"{split}.jsonl").write_text("".join(lines))
    values = {"name": "made", "answer": answer, "template": "{text}", "text": ["text"], "target": "y", **TASKS[answer]}
    values |= {"splits": "given", "dev_split": "dev"}
    (group / "made.yaml").write_text("defaults:\n  - _base\n\n" + yaml.safe_dump(values))
    return ["task=made", f"task.path={data}"]


@pytest.mark.parametrize("answer", TASKS)
def test_an_encoder_learns_and_evaluates(answer, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = written(tmp_path, answer)
    conf = tmp_path / "conf"
    model = ["model=minilm", f"model.path={encoder}", "method=lora", "train.learning_rate=5e-3", "train.max_steps=300"]
    single_run.start("train", [*task, *model, "train.epochs=99", "train.patience=50"], conf, "lrk train")
    run = Run.open(Path("outputs/latest").resolve())
    metric = f"test/{TASKS[answer]['metric']}"
    assert run.metrics[metric] > 0.8
    assert run.metrics.get("test/mse", 0) < 1700, "half the variance, 20² · 8.5"
    single_run.start("evaluate", [f"run={run.path}"], conf, "lrk evaluate")
    assert Run.open("outputs/latest").metrics[metric] == run.metrics[metric]


def test_a_causal_model_is_refused(tmp_path, monkeypatch):
    """By ``lrk check`` and before a sweep starts too."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is causal, but task=made has"):
        stage.check("train", [*written(tmp_path, "tags"), "method=lora"], tmp_path / "conf")
