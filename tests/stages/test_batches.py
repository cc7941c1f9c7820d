"""How the examples of a step are laid out changes the speed and memory of a training, not its result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from command import FOUR_STEPS
from forked import forked_workers
from resuming import history, train_broken_at

from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run
from lowrank_cli.runs import Run

pytestmark = pytest.mark.slow
#: Batches of a mix are random draws of examples with and without packing. Answers have two to four tokens.
MIX = [*FOUR_STEPS, "task=tiny_instruct_mix", "test=false", "method=milora"]


def train(*overrides: str) -> Run:
    with forked_workers():
        single_run.start("train", [*MIX, *overrides], None, "lrk train")
    return Run.open(Path("outputs/latest").resolve())


def assert_close(run: Run, other: Run) -> None:
    for ours, theirs in zip(history(run), history(other), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():  # one for the run, or one for each layer
            assert value == pytest.approx(theirs[key], rel=1e-4), (key, ours["step"])


def predictions(run: Run) -> list[tuple[int, str, str]]:
    rows = map(json.loads, (run.path / "predictions.jsonl").read_text().splitlines())
    return [(row["index"], row["prompt"], row["prediction"]) for row in rows]


def test_a_packed_training_is_that_of_padded_batches(capsys):
    padded = train("hardware.attention=eager", "evaluate.batch_size=3")
    packed, together = (
        train("train.packing=true"),
        train("train.packing=true", "hardware.processes=2", "hardware.shard=node"),
    )
    assert_close(packed, padded)
    assert_close(together, padded)
    assert [run.info["attention"] for run in (padded, packed)] == ["eager", "sdpa"]
    saved = padded.metrics["train/padding"]
    assert 0.1 < saved < 0.9 and packed.metrics["train/padding"] == 0
    assert f"packing: no padding, which would be {saved:.0%} of the positions in batches" in capsys.readouterr().err
    answers = predictions(padded)
    assert answers == predictions(packed)
    lengths = [len(prompt) for _, prompt, _ in answers]
    assert lengths != sorted(lengths)  # though batches of evaluation hold examples of similar lengths
    broken = train_broken_at(4, [*MIX, "train.packing=true"])
    assert history(broken) == history(packed) and broken.metrics["dev/loss"] == packed.metrics["dev/loss"]


def test_packing_is_checked_in_the_precision_of_training(monkeypatch):
    def pack(model):
        raise UserError(f"autocast: {torch.is_autocast_enabled('cpu')}")

    monkeypatch.setattr("lowrank_cli.stages.train.pack", pack)
    with pytest.raises(UserError, match="autocast: True"):
        train("train.packing=true", "hardware.precision=autocast")


@pytest.mark.parametrize(
    ("overrides", "message"),
    {
        "model=minilm task=tiny_sentiment method=lora": "train.packing: true, but the encoder minilm gives one answer "
        "for each row; set it to false",
        "method=idaicl task=tiny_sentiment": "train.packing: true, but method=idaicl trains nothing; set it to false",
        "method=lora hardware.compile=true": "train.packing: true changes the number of examples in a row, which "
        "hardware.compile=true would compile again and again; set one of them to false",
        "hardware.gradient_checkpointing=layers_offloaded": "hardware.gradient_checkpointing: layers_offloaded moves "
        "the inputs of layers from a GPU to the CPU's memory, and hardware.device is cpu; take layers",
        "hardware.attention=torch": "hardware.attention: unknown value 'torch' (allowed: auto, sdpa, flash, eager)",
        "hardware.attention=flash": "hardware.attention: flash is for hardware.device=cuda and hardware.precision=bf16 "
        "or autocast, not cpu and fp32",
        "hardware=gpu hardware.attention=flash": "hardware.attention: flash needs the package flash-attn; install it, "
        "or take sdpa",
    }.items(),
)
def test_what_does_not_go_together_is_one_line(lrk, monkeypatch, overrides, message):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    ended = lrk("check", "train", "train.packing=true", *overrides.split())
    assert (ended.code, ended.err) == (2, f"error: {message}\n")
