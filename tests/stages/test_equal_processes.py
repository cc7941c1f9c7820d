"""Several processes train as one does, whole or divided weights, and one number of them continues another's run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import small
import torch
from command import FOUR_STEPS
from forked import forked_workers
from safetensors.torch import load_file

from lowrank_cli.adapter.files import save_load
from lowrank_cli.errors import Interrupted
from lowrank_cli.launch import single_run
from lowrank_cli.runs import Run

pytestmark = pytest.mark.slow
FEW = [*FOUR_STEPS, "test=false"]
#: Settings that let ranks and windows move within four steps. Windows are drawn: a learnt choice may turn on rounding.
MOVES = {
    "alora": ["method.score=taylor", "method.moved=5", "method.first_epochs=0.5", "method.round_epochs=0.5"],
    "lelora": ["method.policy=random", "method.phase=1", "method.explore=0.8"],
}
WAYS = {
    "ddp": ["hardware.processes=2"],
    "fsdp": ["hardware.processes=2", "hardware.shard=node"],
    "fsdp on two nodes": ["hardware.nodes=2", "hardware.processes=2", "hardware.shard=node"],
    "ddp, 4": ["hardware.processes=4"],
    "fsdp, 4": ["hardware.processes=4", "hardware.shard=node"],
}
#: LRK_EVERY_METHOD=1 adds all methods with two and four processes, which takes 20 minutes of a core.
PAIRS = (
    [(name, way) for name in small.TRAINABLE for way in WAYS if (name, "fsdp") != ("full", way[:4])]
    if os.environ.get("LRK_EVERY_METHOD")
    else [("milora", "fsdp on two nodes"), ("alora", "fsdp"), ("lelora", "fsdp"), ("full", "ddp")]
)


def train(*overrides: str, outputs: str = "outputs") -> Run:
    with forked_workers():
        single_run.start("train", [*FEW, f"outputs={outputs}", *overrides], None, "lrk train")
    return Run.open(Path(outputs, "latest").resolve())


def facts(run: Run) -> dict[str, torch.Tensor]:
    """Losses before each step and on dev, and the logits that the kept adapter gives."""
    rows, canary = run.history(), load_file(run.path / "adapter" / save_load.CANARY)
    of = {key: torch.tensor([row[key] for row in rows if key in row]) for key in ("train/loss", "dev/loss")}
    return {**of, "logits": canary["logits"]}


def assert_equal(run: Run, other: Run) -> None:
    """Within 1e-5 of the largest value."""
    ours, theirs = facts(run), facts(other)
    for key, values in theirs.items():
        torch.testing.assert_close(ours[key], values, rtol=0, atol=1e-5 * values.abs().max().item(), msg=key)


def method_of(name: str) -> list[str]:
    return [f"method={name}", *MOVES.get(name, [])]


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory) -> Callable[[str], Run]:
    """The run of a method in one process, once for all ways."""
    folder = tmp_path_factory.mktemp("alone")
    return cache(lambda name: train(*method_of(name), outputs=str(folder / name)))


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_several_processes_train_as_one(name, way, trained_alone):
    alone, together = trained_alone(name), train(*method_of(name), *WAYS[way], outputs="together")
    assert_equal(together, alone)
    numbers = ("trainable_parameters", "activated_parameters", "total_parameters", "dev/examples", "best_step")
    assert [together.metrics[key] for key in numbers] == [alone.metrics[key] for key in numbers]


def test_a_checkpoint_of_two_processes_continues_on_one_and_on_four(trained_alone):
    overrides = [*FEW, "method=milora", *WAYS["fsdp"]]
    with forked_workers(lambda run: any("train/loss" in row for row in run.history())), pytest.raises(Interrupted):
        single_run.start("train", overrides, None, "lrk train")
    stopped = Run.open(Path("outputs/latest").resolve())
    assert 1 <= len(stopped.history()) < 6 and list(stopped.path.glob("checkpoints/step-*"))
    for count in (1, 4):
        copy = shutil.copytree(stopped.path, f"resumed-{count}")
        with forked_workers():
            single_run.resume("train", str(copy), [f"hardware.processes={count}"])
        assert Run.open(copy).config()["hardware"]["processes"] == count
        assert_equal(Run.open(copy), trained_alone("milora"))


def test_two_processes_calibrate_and_score_as_one():
    """The examples do not divide evenly: one process makes a pass more than the other."""
    few = [
        "task=tiny_sentiment",
        "task.limit=17",
        "hardware.threads=1",
        "evaluate.batch_size=2",
        "evaluate.shots=2",
        "test=false",
    ]
    answers, scores = [], []
    adapted = train("method=lora", "train.max_steps=1")
    for number, way in enumerate(([], WAYS["fsdp"])):
        with forked_workers():
            single_run.start("train", ["method=idaicl", *few, *way, f"outputs=fitted-{number}"], None, "lrk train")
            given = [f"run={adapted.path}", "score.kind=sensitivity", "score.batch=13", f"outputs=scored-{number}"]
            single_run.start("score", [*given, "hardware.threads=1", *way], None, "lrk score")
        rows = Run.open(Path(f"fitted-{number}/latest").resolve()).path / "predictions.jsonl"
        answers.append([json.loads(row)["scores"] for row in rows.read_text().splitlines()])
        modules = Run.open(Path(f"scored-{number}/latest").resolve()).read_json("scores.json")["modules"]
        scores.append([score for module in modules for score in module["scores"]])
    for alone, together in (answers, scores):
        torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    {
        "method=full hardware.processes=2 hardware.shard=node": "hardware.shard: node divides the model's weights, and "
        "method=full trains them; set hardware.shard=null, or take another method",
        "hardware.nodes=3 hardware.processes=2": "train.batch_size: 16 cannot be shared by hardware.nodes=3 times "
        "hardware.processes=2 times train.gradient_accumulation=1",
        "hardware.shard=layers": "hardware.shard: unknown value 'layers' (allowed: null, node, all)",
        "hardware=fsdp hardware.quantization=nf4": "hardware.shard: node divides weights in bf16 or fp32, and "
        "hardware.quantization=nf4 keeps them in 4 bits; set hardware.quantization=null",
    }.items(),
)
def test_what_processes_cannot_share_is_one_line(lrk, overrides, message):
    ended = lrk("check", "train", *overrides.split())
    assert (ended.code, ended.err) == (2, f"error: {message}\n")


def test_only_a_number_of_processes_may_change(lrk):
    train("method=lora", "train.max_steps=1")
    run = Run.open(Path("outputs/latest").resolve())
    run.update(status="interrupted")
    for override, message in (
        ("hardware.processes=x", "hardware.processes: 'x' is not a whole number (allowed: 1 or more)"),
        ("hardware.processes=3", "train.batch_size: 8 cannot be shared by hardware.processes=3"),
        ("hardware.device=cuda", "--resume: a run continues with its own configuration; leave out hardware.device"),
    ):
        ended = lrk("train", "--resume", str(run.path), override)
        assert ended.code == 2 and ended.err.startswith(f"error: {message}")
    assert run.config()["hardware"]["processes"] == 1
