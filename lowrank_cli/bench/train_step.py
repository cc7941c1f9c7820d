"""``lrk bench train``: the cost of a training step with an adapter, relative to the frozen model alone.

A step is the forward pass, the loss (with the method's own term, if it has one) and the backward pass, which always
reaches the input embeddings: so ``base``, which trains nothing, does the minimum for an adapter on all layers. If a
method also steps on dev batches, a second ratio adds a step's share of that, on a batch of the same size. The optimizer
and a method's other work between steps are not measured. The loss is that of ``lrk train``, which computes the head at
answers only; the PEFT library's LoRA uses the model's own loss, or the fused one of another package.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cli.adapter.lm_head import answer_losses
from lowrank_cli.adapter.training.compiled import compile_layers
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.bench.base_model import autocast, load_base
from lowrank_cli.bench.bench_models import BenchModel, bench_models
from lowrank_cli.bench.entries import available_methods, is_peft
from lowrank_cli.bench.examples import Batch, batch_of, described
from lowrank_cli.bench.memory import held_memory, memory_meaning, peak_memory, reset_peak, synchronized
from lowrank_cli.bench.rounds import bars, flat, in_turns, quartiles, ratio
from lowrank_cli.methods.protocol import AddsLoss, Step, StepsOnDev
from lowrank_cli.runs import Run, progress
from lowrank_cli.schema import BASE, BenchRun, HardwareConfig

PEFT = "peft"  #: the entry that is the second reference of ratios, if it is measured


@dataclass
class Sample:
    """One step: its time and the processor time of the process, in seconds, and its memory in bytes.

    ``on_dev`` is a training step's share of the time that the method's own steps on dev batches take, in seconds.
    """

    seconds: float
    cpu_seconds: float
    on_dev: float
    memory: int  #: peak
    step_memory: int  #: peak minus what was in use before the step


def measure(config: BenchRun, run: Run) -> dict[str, Any]:
    """A row for each method, trained on one batch."""
    base = load_base(config, run)
    batch = batch_of(config, base)
    models = bench_models(base.model, available_methods(config), config.seed)
    with autocast(config), progress.bar("measuring", (config.bench.rounds + 1) * len(models), shown=True) as bar:
        rows = compare(models, batch, config, bar)
    return {**base.facts, "memory": memory_meaning(base.device, "step"), "rows": rows, "data": described(batch, config)}


def compare(
    models: Mapping[str, BenchModel], batch: Batch, config: BenchRun, bar: progress.Bar
) -> list[dict[str, Any]]:
    """A row for each of ``models``, trained on ``batch``."""
    for name, bench_model in models.items():
        set_up(bench_model, config.hardware, is_peft(name))
    saved = {name: saved_bytes(bench_model, batch) for name, bench_model in models.items()}
    cell = in_turns(models, models.values(), config.bench.rounds, lambda bench_model: timed(bench_model, batch), bar)
    tokens = int(batch["attention_mask"].sum())
    return [row(tokens, name, models[name], saved[name], cell) for name in models]


def set_up(bench_model: BenchModel, hardware: HardwareConfig, peft: bool = False) -> None:
    """Put a model into training mode, compiled and (for our methods) with checkpointing as ``hardware`` says."""
    bench_model.model.train()
    if hardware.compile:
        compile_layers(bench_model.model.get_base_model() if peft else bench_model.model)
    if bench_model.adapter is not None:
        recompute(bench_model.adapter.model, hardware.gradient_checkpointing, hardware.compile)


def loss(bench_model: BenchModel, batch: Batch) -> Tensor:
    """The loss of a step on ``batch``; its graph begins at the embeddings."""
    total = cross_entropy(bench_model, batch)
    if bench_model.adapter is not None and isinstance(bench_model.method, AddsLoss):
        total = total + bench_model.method.extra_loss(bench_model.adapter)
    return total


def cross_entropy(bench_model: BenchModel, batch: Batch) -> Tensor:
    """:func:`loss` without the method's own term."""
    embedded = (
        bench_model.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    )  # (B, T) -> (B, T, D)
    inputs = {"inputs_embeds": embedded, "attention_mask": batch["attention_mask"]}
    if not isinstance(bench_model.model, PreTrainedModel):
        outputs = bench_model.model(**inputs, labels=batch["labels"], use_cache=False, **bench_model.arguments)
        return outputs.loss
    if bench_model.adapter is not None and bench_model.adapter.routing is not None and "prompt_mask" in batch:
        inputs["prompt_mask"] = batch["prompt_mask"]
    return answer_losses(bench_model.model, inputs, batch["labels"]).mean()


def timed(bench_model: BenchModel, batch: Batch) -> Sample:
    """Time one step, and one on a dev batch if the method takes such steps."""
    device = batch["input_ids"].device
    reset_peak(device)
    synchronized(device)
    before, began, processor = held_memory(device), time.perf_counter(), time.process_time()
    loss(bench_model, batch).backward()
    synchronized(device)
    seconds, cpu_seconds, peak = time.perf_counter() - began, time.process_time() - processor, peak_memory(device)
    bench_model.model.zero_grad()
    return Sample(seconds, cpu_seconds, _on_dev(bench_model, batch), peak, peak - before)


def _on_dev(bench_model: BenchModel, batch: Batch) -> float:
    """Seconds of a dev step divided by the number of training steps between two of them.

    The parameters that the dev step changes are restored.
    """
    method, adapter = bench_model.method, bench_model.adapter
    if adapter is None or not isinstance(method, StepsOnDev) or not method.dev_every:
        return 0.0
    step = Step(1, 1, adapter, 0.0, lambda number=1: cross_entropy(bench_model, batch), lambda tensor: tensor)
    before = {name: adapter.trained[name].detach().clone() for name in adapter.deferred}
    began = time.perf_counter()
    method.dev_step(step)
    synchronized(batch["input_ids"].device)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        for name, tensor in before.items():
            adapter.trained[name].copy_(tensor)
    return seconds / method.dev_every


def saved_bytes(bench_model: BenchModel, batch: Batch) -> int:
    """Bytes that the forward pass keeps for the backward pass, without the model's parameters and buffers."""
    of_model = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*bench_model.model.parameters(), *bench_model.model.buffers())
    }
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_model:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = loss(bench_model, batch)
    del graph
    return sum(storages.values())


def row(
    tokens: int, name: str, bench_model: BenchModel, saved: int, cell: Mapping[str, Sequence[Sample]]
) -> dict[str, Any]:
    """The results of one method, with ratios (lower is better) to others of ``cell``.

    Args:
        tokens: tokens of a step.
        saved: bytes that the forward pass keeps; see :func:`saved_bytes`.
        cell: the samples of all methods, round by round.
    """
    samples = cell[name]
    seconds = [sample.seconds for sample in samples]
    median, spread = ratio(samples, cell[BASE], lambda sample: sample.seconds)
    pairs = zip(samples, cell[BASE], strict=True)
    with_dev = [(sample.seconds + sample.on_dev) / base.seconds for sample, base in pairs]
    result: dict[str, Any] = {
        "method": name,
        "step_ratio": median,
        "step_ratio_quartiles": spread,
        "step_ratio_with_dev": statistics.median(with_dev),
        "step_ratio_with_dev_quartiles": quartiles(with_dev),
        "cpu_ratio": ratio(samples, cell[BASE], lambda sample: sample.cpu_seconds)[0],
        "ms_per_step": 1000 * statistics.median(seconds),
        "tokens_per_second": tokens / statistics.median(seconds),
        "saved_bytes": saved,
        "peak_memory_bytes": max(sample.memory for sample in samples),
        "step_memory_bytes": max(sample.step_memory for sample in samples),
        "parameters": bench_model.parameters,
        "adapters_bytes": bench_model.adapters_bytes,
        "seconds": seconds,
        "seconds_on_dev": [sample.on_dev for sample in samples],
        "cpu_seconds": [sample.cpu_seconds for sample in samples],
    }
    if PEFT in cell:
        other = cell[PEFT]
        result |= {
            "peft_ratio": ratio(samples, other, lambda sample: sample.seconds)[0],
            "peft_cpu_ratio": ratio(samples, other, lambda sample: sample.cpu_seconds)[0],
            "peft_memory_ratio": result["step_memory_bytes"] / max(1, *(sample.step_memory for sample in other)),
        }
    return result


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Flat numbers, ``bench/<method>/<key>``."""
    keys = (
        "step_ratio",
        "step_ratio_with_dev",
        "cpu_ratio",
        "ms_per_step",
        "tokens_per_second",
        "saved_bytes",
        "peak_memory_bytes",
        "step_memory_bytes",
        "parameters",
        "peft_ratio",
        "peft_cpu_ratio",
        "peft_memory_ratio",
    )
    return flat(record, keys)


def figures(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A bar plot of the time of a step."""
    figure = bars(
        record,
        "step_ratio",
        file="train.png",
        title=f"A training step against the frozen model's own ({record['device']}, {record['data']})",
        columns=["time of a step"],
        label="× base (median, quartiles)",
    )
    return [figure]
