"""``lrk bench train``: what an adapter costs in training, against the frozen model alone, in interleaved rounds.

A step is the forward pass, the loss (with the method's own term, where it adds one) and the backward pass. It always
reaches the input embeddings, so that ``base``, which trains nothing, does what every adapter on all layers must do at
least. Where a method steps on dev batches between these steps, a second ratio has a step's share of that, on a batch of
the same size. What else a method does between steps, and the optimizer, are not part of either.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_cli.adapter.compiled import compile_layers
from lowrank_cli.adapter.recompute import recompute
from lowrank_cli.methods.protocol import AddsLoss, Step, StepsOnDev
from lowrank_cli.schema import BASE, BenchConfig, BenchRun
from lowrank_cli.stages.bench_rounds import in_turns, peak_memory, reset_peak, synchronized
from lowrank_cli.stages.bench_rows import quartiles
from lowrank_cli.stages.progress import Bar
from lowrank_cli.stages.twins import Twin, is_peft


@dataclass
class Sample:
    """One step: its time and the processor time of the process, in seconds, and its peak memory in bytes.

    ``on_dev`` is a training step's share of the time that the method's own steps on dev batches take, in seconds.
    """

    seconds: float
    cpu_seconds: float
    on_dev: float
    memory: int


def measure(models: Mapping[str, Twin], ids: Tensor, config: BenchRun, bar: Bar) -> list[dict[str, Any]]:
    """A row for each of ``models``, trained on the tokens ``ids`` (B, T).

    Our methods with the run's checkpointing; all, base and peft too, with its compilation.
    """
    bench = config.bench
    for name, twin in models.items():
        twin.model.train()
        if config.hardware.compile:
            compile_layers(twin.model.get_base_model() if is_peft(name) else twin.model)
        if twin.adapter is not None:
            recompute(twin.adapter.model, config.hardware.gradient_checkpointing, config.hardware.compile)
    saved = {name: saved_bytes(twin, ids) for name, twin in models.items()}
    cell = in_turns(models, models.values(), bench.rounds, lambda twin: timed(twin, ids), bar)
    return [row(bench, name, models[name], saved[name], cell) for name in models]


def loss(twin: Twin, ids: Tensor) -> Tensor:
    """The loss of a step, whose graph begins at the embeddings of ``ids`` (B, T)."""
    found = cross_entropy(twin, ids)
    if twin.adapter is not None and isinstance(twin.method, AddsLoss):
        found = found + twin.method.extra_loss(twin.adapter)
    return found


def cross_entropy(twin: Twin, ids: Tensor) -> Tensor:
    """The model's own part of :func:`loss`."""
    embedded = twin.model.get_input_embeddings()(ids).detach().requires_grad_()  # (B, T) -> (B, T, D)
    logits = twin.model(inputs_embeds=embedded, use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def timed(twin: Twin, ids: Tensor) -> Sample:
    """One step, and one on dev where the method takes them."""
    reset_peak(ids.device)
    synchronized(ids.device)
    began, processor = time.perf_counter(), time.process_time()
    loss(twin, ids).backward()
    synchronized(ids.device)
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    twin.model.zero_grad()
    on_dev = _on_dev(twin, ids)
    return Sample(seconds, processor, on_dev, peak_memory(ids.device))


def _on_dev(twin: Twin, ids: Tensor) -> float:
    """Seconds of one of the method's own steps on dev, over the training steps that there are for each.

    What it changes is put back.
    """
    method, adapter = twin.method, twin.adapter
    if adapter is None or not isinstance(method, StepsOnDev) or not method.dev_every:
        return 0.0
    step = Step(1, 1, adapter, 0.0, lambda number=1: cross_entropy(twin, ids), lambda tensor: tensor)
    before = {name: adapter.trained[name].detach().clone() for name in adapter.deferred}
    began = time.perf_counter()
    method.dev_step(step)
    synchronized(ids.device)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        for name, tensor in before.items():
            adapter.trained[name].copy_(tensor)
    return seconds / method.dev_every


def saved_bytes(twin: Twin, ids: Tensor) -> int:
    """Memory of what the forward pass keeps for the backward pass, weights and other state of the model apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*twin.model.parameters(), *twin.model.buffers())}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = loss(twin, ids)
    del graph
    return sum(found.values())


def row(bench: BenchConfig, name: str, twin: Twin, saved: int, cell: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """One method next to the others of ``cell``; ratios are of time, so that less is better."""
    pairs = list(zip(cell[name], cell[BASE], strict=True))
    ratios = [own.seconds / base.seconds for own, base in pairs]
    with_dev = [(own.seconds + own.on_dev) / base.seconds for own, base in pairs]
    return {
        "method": name,
        "step_ratio": statistics.median(ratios),
        "step_ratio_quartiles": quartiles(ratios),
        "step_ratio_with_dev": statistics.median(with_dev),
        "step_ratio_with_dev_quartiles": quartiles(with_dev),
        "cpu_ratio": statistics.median(own.cpu_seconds / base.cpu_seconds for own, base in pairs),
        "ms_per_step": 1000 * statistics.median(own.seconds for own, _ in pairs),
        "tokens_per_second": bench.batch_size
        * bench.prompt_length
        / statistics.median(own.seconds for own, _ in pairs),
        "saved_bytes": saved,
        "peak_memory_bytes": max(own.memory for own, _ in pairs),
        "parameters": twin.parameters,
        "adapters_bytes": twin.own_bytes,
        "seconds": [own.seconds for own, _ in pairs],
        "seconds_on_dev": [own.on_dev for own, _ in pairs],
        "cpu_seconds": [own.cpu_seconds for own, _ in pairs],
    }


def metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Flat numbers, ``bench/<method>/<what>``."""
    plain = (
        "step_ratio",
        "step_ratio_with_dev",
        "cpu_ratio",
        "ms_per_step",
        "tokens_per_second",
        "saved_bytes",
        "peak_memory_bytes",
        "parameters",
    )
    return {f"bench/{row['method']}/{key}": row[key] for row in rows for key in plain}


def figures(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars of the time of a step."""
    rows, bench = record["rows"], record["bench"]
    figure = {
        "file": "train.png",
        "kind": "bars",
        "title": f"A training step against the frozen model's own ({record['device']}, "
        f"{bench['batch_size']} × {bench['prompt_length']} tokens)",
        "rows": [row["method"] for row in rows],
        "columns": ["time of a step"],
        "values": [[row["step_ratio"]] for row in rows],
        "low": [[row["step_ratio_quartiles"][0]] for row in rows],
        "high": [[row["step_ratio_quartiles"][1]] for row in rows],
        "label": "× base (median, quartiles)",
    }
    return [figure]
