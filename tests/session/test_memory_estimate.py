"""The memory of a training step, estimated on fake tensors, against what torch's allocator reports for a real one."""

from __future__ import annotations

import re
from itertools import accumulate

import pytest
import torch
from command import one_line
from torch.profiler import ProfilerActivity, profile

from lowrank_cli.config.composition import compose
from lowrank_cli.session.ledger import Ledger, counting
from lowrank_cli.session.memory import Length, TrainingStep

ROWS = 8
LENGTH = Length(48, 48, "")  # every position is an answer: a real mask selects what the ledger assumes


def estimated(*overrides: str, rows: int = ROWS):
    config = compose("train", list(overrides), None).config
    with counting() as ledger:
        return TrainingStep(config, LENGTH, ledger).memory(rows)


def allocated(*overrides: str) -> int:
    """The peak of the same step on real tensors: what is there before, and what torch's allocator adds to it."""
    config = compose("train", list(overrides), None).config
    step = TrainingStep(config, LENGTH, Ledger())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        memory = step.memory(ROWS)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return memory.weights + memory.adapter + memory.optimizer + max(accumulate(changes))


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lora"],
        ["method=milora", "hardware.gradient_checkpointing=none"],
        ["method=dora", "hardware.gradient_checkpointing=layers"],
        ["method=full", "train.gradient_accumulation=2"],
    ],
    ids=" ".join,
)
def test_estimate_equals_what_is_allocated(overrides):
    assert estimated(*overrides).peak == pytest.approx(allocated(*overrides), rel=0.03)


def test_recomputing_and_half_precision_take_less():
    kept = estimated("method=lora", "hardware.gradient_checkpointing=none")
    assert estimated("method=lora", "hardware.gradient_checkpointing=layers").activations < kept.activations / 3
    half = estimated("method=lora", "hardware.gradient_checkpointing=none", "hardware.precision=bf16")
    assert half.weights == pytest.approx(kept.weights / 2, rel=1e-3)  # rotary frequencies stay in fp32
    assert half.adapter == kept.adapter and half.activations < kept.activations
    assert estimated("method=lora", "hardware.processes=2").gradients == 2 * kept.gradients


def test_divided_layers_take_a_share_and_two_gathered_ones():
    whole, *divided = (
        estimated("method=lora", "hardware.shard=node", f"hardware.processes={count}") for count in (1, 2, 4)
    )
    two, four = (whole.weights - each.weights for each in divided)  # six equal layers: 6/2 - 2 and 6 · 3/4 - 2 of them
    assert two > 0 and four == pytest.approx(2.5 * two)
    assert whole.peak - divided[0].peak == pytest.approx(two - divided[0].adapter)  # the bucket comes on top


def test_a_packed_row_takes_a_mask_besides():
    plain = estimated("method=lora")
    packed = estimated("method=lora", "train.packing=true")
    mask = (ROWS * LENGTH.tokens) ** 2
    assert (packed.peak - plain.peak, packed.activations - plain.activations) == (mask, mask)


@pytest.mark.parametrize("packing", ["train.packing=false", "train.packing=true"])
def test_the_largest_batch_fits_and_a_larger_one_does_not(packing):
    with counting() as ledger:
        step = TrainingStep(compose("train", ["method=lora", packing], None).config, LENGTH, ledger)
        most = step.most_rows(ROWS, 2**27)
        assert step.memory(most).peak <= 2**27 < step.memory(most + 2).peak
        assert step.most_rows(ROWS, 2**20) == 0


def test_check_prints_the_memory_of_a_training(lrk):
    ended = lrk("check", "method=lora", "task.limit=64", "--memory", "1")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"16 examples of \d+ tokens \(the longest training example\)", ended.out)
    assert "fits 70% of 1 GiB" in ended.out and "activations" in ended.out
    assert "no example fits" in lrk("check", "method=lora", "task.limit=64", "--memory", "0.001").out
    assert "a number above 0, auto" in one_line(lrk("check", "method=lora", "--memory", "much"))
    eager = ("train.packing=true", "hardware.attention=eager")
    assert "packed rows are not estimated" in one_line(lrk("check", "method=lora", *eager, "--memory", "1"))
    assert "memory" not in lrk("check", "evaluate", "method=none", "--memory", "1").out


def test_fake_tensors_do_not_outlive_an_estimate():
    estimated("method=milora")
    step = TrainingStep(compose("train", ["method=milora"], None).config, LENGTH, Ledger())
    assert all(type(parameter) is torch.nn.Parameter for parameter in step.adapter.trained.values())
