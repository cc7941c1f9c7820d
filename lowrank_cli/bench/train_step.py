"""``lrk bench train``: what an adapter costs in training, against the frozen model alone, in interleaved rounds.

A step is the forward pass, the loss (with the method's own term, where it adds one) and the backward pass. It always
reaches the input embeddings, so that ``base``, which trains nothing, does what every adapter on all layers must do at
least. Where a method steps on dev batches between these steps, a second ratio has a step's share of that, on a batch of
the same size. What else a method does between steps, and the optimizer, are not part of either. The loss is that of
``lrk train``, with the head computed at answers only; of the PEFT library's LoRA it is the model's own, or one that
another package brings.
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
from lowrank_cli.bench.base_model import autocast, load_base, obtainable
from lowrank_cli.bench.examples import Batch, batch_of, described
from lowrank_cli.bench.rounds import (
    bars,
    flat,
    held_memory,
    in_turns,
    memory_meaning,
    peak_memory,
    quartiles,
    ratio,
    reset_peak,
    synchronized,
)
from lowrank_cli.bench.shared_weights import Twin, is_peft, twins
from lowrank_cli.inference import progress
from lowrank_cli.methods.protocol import AddsLoss, Step, StepsOnDev
from lowrank_cli.runs import Run
from lowrank_cli.schema import BASE, BenchRun, HardwareConfig

PEFT = "peft"  #: the method that ratios are taken to as well


@dataclass
class Sample:
    """One step: its time and the processor time of the process, in seconds, and its memory in bytes.

    ``on_dev`` is a training step's share of the time that the method's own steps on dev batches take, in seconds.
    """

    seconds: float
    cpu_seconds: float
    on_dev: float
    memory: int  #: at its peak
    step_memory: int  #: of that what came during the step


def measure(config: BenchRun, run: Run) -> dict[str, Any]:
    """A row for each method, trained on one batch."""
    base = load_base(config, run)
    batch = batch_of(config, base)
    models = twins(base.model, obtainable(config), config.seed)
    with autocast(config), progress.bar("measuring", (config.bench.rounds + 1) * len(models), shown=True) as bar:
        rows = compare(models, batch, config, bar)
    return {**base.facts, "memory": memory_meaning(base.device, "step"), "rows": rows, "data": described(batch, config)}


def compare(models: Mapping[str, Twin], batch: Batch, config: BenchRun, bar: progress.Bar) -> list[dict[str, Any]]:
    """A row for each of ``models``, trained on ``batch``."""
    for name, twin in models.items():
        set_up(twin, config.hardware, is_peft(name))
    saved = {name: saved_bytes(twin, batch) for name, twin in models.items()}
    cell = in_turns(models, models.values(), config.bench.rounds, lambda twin: timed(twin, batch), bar)
    tokens = int(batch["attention_mask"].sum())
    return [row(tokens, name, models[name], saved[name], cell) for name in models]


def set_up(twin: Twin, hardware: HardwareConfig, peft: bool = False) -> None:
    """Training mode, with the run's compilation, and of our methods with its checkpointing."""
    twin.model.train()
    if hardware.compile:
        compile_layers(twin.model.get_base_model() if peft else twin.model)
    if twin.adapter is not None:
        recompute(twin.adapter.model, hardware.gradient_checkpointing, hardware.compile)


def loss(twin: Twin, batch: Batch) -> Tensor:
    """The loss of a step on ``batch``, whose graph begins at the embeddings."""
    found = cross_entropy(twin, batch)
    if twin.adapter is not None and isinstance(twin.method, AddsLoss):
        found = found + twin.method.extra_loss(twin.adapter)
    return found


def cross_entropy(twin: Twin, batch: Batch) -> Tensor:
    """The model's own part of :func:`loss`."""
    embedded = twin.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()  # (B, T) -> (B, T, D)
    inputs = {"inputs_embeds": embedded, "attention_mask": batch["attention_mask"]}
    if not isinstance(twin.model, PreTrainedModel):
        found: Tensor = twin.model(**inputs, labels=batch["labels"], use_cache=False, **twin.arguments).loss
        return found
    if twin.adapter is not None and twin.adapter.routing is not None and "prompt_mask" in batch:
        inputs["prompt_mask"] = batch["prompt_mask"]
    return answer_losses(twin.model, inputs, batch["labels"]).mean()


def timed(twin: Twin, batch: Batch) -> Sample:
    """One step, and one on dev where the method takes them."""
    device = batch["input_ids"].device
    reset_peak(device)
    synchronized(device)
    before, began, processor = held_memory(device), time.perf_counter(), time.process_time()
    loss(twin, batch).backward()
    synchronized(device)
    seconds, cpu_seconds, peak = time.perf_counter() - began, time.process_time() - processor, peak_memory(device)
    twin.model.zero_grad()
    return Sample(seconds, cpu_seconds, _on_dev(twin, batch), peak, peak - before)


def _on_dev(twin: Twin, batch: Batch) -> float:
    """Seconds of one of the method's own steps on dev, over the training steps that there are for each.

    What it changes is put back.
    """
    method, adapter = twin.method, twin.adapter
    if adapter is None or not isinstance(method, StepsOnDev) or not method.dev_every:
        return 0.0
    step = Step(1, 1, adapter, 0.0, lambda number=1: cross_entropy(twin, batch), lambda tensor: tensor)
    before = {name: adapter.trained[name].detach().clone() for name in adapter.deferred}
    began = time.perf_counter()
    method.dev_step(step)
    synchronized(batch["input_ids"].device)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        for name, tensor in before.items():
            adapter.trained[name].copy_(tensor)
    return seconds / method.dev_every


def saved_bytes(twin: Twin, batch: Batch) -> int:
    """Memory of what the forward pass keeps for the backward pass, weights and other state of the model apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*twin.model.parameters(), *twin.model.buffers())}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = loss(twin, batch)
    del graph
    return sum(found.values())


def row(tokens: int, name: str, twin: Twin, saved: int, cell: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """One method next to the others of ``cell``, over ``tokens`` a step; ratios are of what is best small."""
    samples = cell[name]
    seconds = [sample.seconds for sample in samples]
    median, both = ratio(samples, cell[BASE], lambda sample: sample.seconds)
    pairs = zip(samples, cell[BASE], strict=True)
    with_dev = [(own.seconds + own.on_dev) / base.seconds for own, base in pairs]
    found: dict[str, Any] = {
        "method": name,
        "step_ratio": median,
        "step_ratio_quartiles": both,
        "step_ratio_with_dev": statistics.median(with_dev),
        "step_ratio_with_dev_quartiles": quartiles(with_dev),
        "cpu_ratio": ratio(samples, cell[BASE], lambda sample: sample.cpu_seconds)[0],
        "ms_per_step": 1000 * statistics.median(seconds),
        "tokens_per_second": tokens / statistics.median(seconds),
        "saved_bytes": saved,
        "peak_memory_bytes": max(sample.memory for sample in samples),
        "step_memory_bytes": max(sample.step_memory for sample in samples),
        "parameters": twin.parameters,
        "adapters_bytes": twin.own_bytes,
        "seconds": seconds,
        "seconds_on_dev": [sample.on_dev for sample in samples],
        "cpu_seconds": [sample.cpu_seconds for sample in samples],
    }
    if PEFT in cell:
        other = cell[PEFT]
        found |= {
            "peft_ratio": ratio(samples, other, lambda sample: sample.seconds)[0],
            "peft_cpu_ratio": ratio(samples, other, lambda sample: sample.cpu_seconds)[0],
            "peft_memory_ratio": found["step_memory_bytes"] / max(1, *(sample.step_memory for sample in other)),
        }
    return found


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Flat numbers, ``bench/<method>/<what>``."""
    plain = (
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
    return flat(record, plain)


def figures(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bars of the time of a step."""
    figure = bars(
        record,
        "step_ratio",
        file="train.png",
        title=f"A training step against the frozen model's own ({record['device']}, {record['data']})",
        columns=["time of a step"],
        label="× base (median, quartiles)",
    )
    return [figure]
