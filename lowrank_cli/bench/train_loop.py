"""``lrk bench loop``: whole training steps, including the optimizer and a method's own work between steps.

While ``lrk bench train`` times a forward and a backward pass on shared weights, here each method trains its own copy
of the model for ``bench.steps`` steps a round, the first steps of a training of ``bench.total_steps``. Scores that a
method takes on dev examples use the training batch, repeated to the requested size.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_cli import methods
from lowrank_cli.bench.base_model import autocast, load_base
from lowrank_cli.bench.bench_models import BenchModel
from lowrank_cli.bench.entries import available_methods
from lowrank_cli.bench.examples import Batch, batch_of, described
from lowrank_cli.bench.memory import synchronized
from lowrank_cli.bench.rounds import interleaved
from lowrank_cli.bench.timings import Timing, figures, metrics, rows
from lowrank_cli.bench.train_step import cross_entropy, loss, set_up
from lowrank_cli.methods.protocol import Adapts, AfterStep, BeforeStep, Step
from lowrank_cli.runs import Run, progress
from lowrank_cli.schema import BenchRun, LoopBench, MethodConfig
from lowrank_cli.scoring.probe import Probe

__all__ = ["figures", "measure", "metrics"]

LEARNING_RATE = 1e-4  #: does not affect the time


def measure(config: BenchRun, run: Run) -> dict[str, Any]:
    """A row for each of ``bench.methods`` with its mean time of a step; ratios are relative to the first."""
    bench = config.bench
    assert isinstance(bench, LoopBench)
    base = load_base(config, run)
    batch = batch_of(config, base)
    loops = {}
    for entry, variant in available_methods(config).items():
        assert variant is not None
        torch.manual_seed(config.seed)
        loops[entry] = Loop(_adapted(copy.deepcopy(base.model), variant), batch, bench.total_steps)
        set_up(loops[entry].bench_model, config.hardware)
    work = {entry: partial(loop.train, bench.steps) for entry, loop in loops.items()}
    with autocast(config), progress.bar("measuring", (bench.rounds + 1) * len(loops), shown=True) as bar:
        samples = interleaved(work, bench.rounds, bar)
    result = rows(samples, next(iter(samples)))
    for row in result:
        loop = loops[row["method"]]
        row["first_round_seconds_between"] = loop.between[0] * bench.steps
        row["between_share"] = sum(loop.between[1:]) / sum(loop.whole[1:])
    return {
        **base.facts,
        "title": f"A whole training step, {described(batch, config)}",
        "data": described(batch, config),
        "notes": [f"{row['method']}: {row['between_share']:.1%} of the time is spent between steps" for row in result],
        "rows": result,
    }


def _adapted(model: Any, variant: MethodConfig) -> BenchModel:
    """``model`` adapted by the method, which may change its weights."""
    method = methods.create(variant)
    assert isinstance(method, Adapts)
    model.requires_grad_(False)
    adapter = method.adapt(model)
    adapter.require_declared()
    return BenchModel(model, method, adapter, adapter.count())


@dataclass
class Loop:
    """One method's training, continued from round to round."""

    bench_model: BenchModel
    batch: Batch
    total: int  #: steps of the whole training
    number: int = 0  #: steps taken so far
    whole: list[float] = field(default_factory=list)  #: mean seconds of a step, by round
    between: list[float] = field(default_factory=list)  #: the share of it that the method spends between steps

    def __post_init__(self) -> None:
        adapter = self.bench_model.adapter
        assert adapter is not None
        stepped = [tensor for name, tensor in adapter.trained.items() if name not in adapter.deferred]
        self.adapter = adapter
        self.optimizer = torch.optim.AdamW([{"params": stepped}], lr=LEARNING_RATE, fused=True)

    def train(self, steps: int) -> Timing:
        """Take ``steps`` steps, and return the mean time of one."""
        device = self.batch["input_ids"].device
        synchronized(device)
        began, processor, between = time.perf_counter(), time.process_time(), 0.0
        for _ in range(steps):
            between += self._step(device)
        synchronized(device)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - processor
        self.whole.append(seconds / steps)
        self.between.append(between / steps)
        return Timing(seconds / steps, cpu_seconds / steps)

    def _step(self, device: torch.device) -> float:
        """Take one step, and return the seconds that the method spends before and after the optimizer."""
        self.number += 1
        method, bench_model = self.bench_model.method, self.bench_model
        loss(bench_model, self.batch).backward()
        now = Step(
            self.number,
            self.total,
            self.adapter,
            LEARNING_RATE,
            lambda number=0: cross_entropy(bench_model, self.batch),
            lambda tensor: tensor,
            epoch=self.total,
            tokens=float(self.total * int(self.batch["attention_mask"].sum())),
            optimizer=self.optimizer,
            probe=self._probe,
        )
        seconds = 0.0
        if isinstance(method, BeforeStep):
            seconds += self._clocked(partial(method.before_step, now), device)
        self.optimizer.step()
        torch.autograd.graph.increment_version(self.adapter.trained.values())  # a fused step does not
        bench_model.model.zero_grad()
        if isinstance(method, AfterStep):
            seconds += self._clocked(partial(method.after_step, now), device)
        return seconds

    @staticmethod
    def _clocked(work: Any, device: torch.device) -> float:
        synchronized(device)
        began = time.perf_counter()
        work()
        synchronized(device)
        return time.perf_counter() - began

    def _probe(self, size: int, tokens: int) -> Probe:
        def tiled(tensor: Tensor) -> Tensor:
            return tensor.repeat(-(-size // len(tensor)), 1)[:size]  # (B, T) -> (size, T)

        return Probe({key: tiled(value) for key, value in self.batch.items() if key != "prompt_mask"}, tokens)
