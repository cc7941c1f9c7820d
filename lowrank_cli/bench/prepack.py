"""``lrk bench prepack``: a decoding step with the frozen weights packed for the CPU, and with them unpacked.

Every row of the batch has its own adapter, from a bank; ``base`` has none. ``lrk generate`` and ``lrk bench decode``
pack weights if memory allows (``hardware.prepack``).
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_cli.adapter.kv_cache import pass_cache, returned_cache
from lowrank_cli.adapter.module_copy import copied
from lowrank_cli.bench.base_model import load_base
from lowrank_cli.bench.bench_models import BenchModel, tenant_models
from lowrank_cli.bench.entries import available_methods
from lowrank_cli.bench.rounds import interleaved
from lowrank_cli.bench.timings import Timing, figures, metrics, rows, timed
from lowrank_cli.models import prepack
from lowrank_cli.runs import Run, progress
from lowrank_cli.schema import BASE, BenchRun, PrepackBench

__all__ = ["figures", "measure", "metrics"]


def measure(config: BenchRun, run: Run) -> dict[str, Any]:
    """Two rows for each of ``bench.methods``; times are relative to the bare model with unpacked weights."""
    bench = config.bench
    assert isinstance(bench, PrepackBench)
    base = load_base(config, run)
    plain = base.model.requires_grad_(False)
    packed = copied(plain)
    prepack.prepack(packed)
    variants, count, grouped = available_methods(config), bench.tenants, config.hardware.grouped
    models = {
        name + suffix: bench_model
        for model, suffix in ((plain, ""), (packed, ", packed"))
        for name, bench_model in tenant_models(model, variants, [count], count, config.seed, grouped)[count].items()
    }
    prompts = torch.randint(base.vocabulary, (count, bench.prompt_length))
    logits: dict[str, Tensor] = {}

    def sample(name: str) -> Timing:
        timing, logits[name] = decoding_step(models[name], prompts, bench.new_tokens)
        return timing

    with progress.bar("measuring", (bench.rounds + 1) * len(models), shown=True) as bar:
        samples = interleaved({name: partial(sample, name) for name in models}, bench.rounds, bar)
    error = max(_difference(logits[name], logits[f"{name}, packed"]) for name in variants)
    return {
        **base.facts,
        "title": f"A decoding step of {count} rows, with packed weights and without",
        "notes": [f"logits: packed and plain differ by {error:.1e} of the largest"],
        "logits_differ": error,
        "rows": rows(samples, BASE),
    }


@torch.no_grad()
def decoding_step(bench_model: BenchModel, prompts: Tensor, steps: int) -> tuple[Timing, Tensor]:
    """The median time of ``steps`` decoding steps after the prompts (B, T), and the last logits (B, V)."""
    with bench_model.context():
        cache = returned_cache(bench_model.model(input_ids=prompts, use_cache=True))
        outputs: list[Tensor] = []

        def step() -> None:
            out = bench_model.model(input_ids=prompts[:, :1], use_cache=True, **pass_cache(bench_model.model, cache))
            outputs.append(out.logits[:, -1])  # (B, 1, V) -> (B, V)

        timings = [timed(step, prompts.device) for _ in range(steps)]
    median = Timing(*(statistics.median(getattr(one, key) for one in timings) for key in ("seconds", "cpu_seconds")))
    return median, outputs[-1]


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest of ``one``."""
    return ((one - other).abs().max() / one.abs().max()).item()
