"""``lrk bench decode``: generation with unmerged adapters, one alone or many in one batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from lowrank_cli.adapter.kv_cache import growing_cache
from lowrank_cli.bench import vllm
from lowrank_cli.bench.base_model import autocast, load_base
from lowrank_cli.bench.bench_models import BenchModel, bench_models, tenant_models
from lowrank_cli.bench.decode_rows import Sample, compared, figures, metrics, row
from lowrank_cli.bench.entries import available_methods, is_vllm
from lowrank_cli.bench.memory import memory_meaning, peak_memory, reset_peak, synchronized
from lowrank_cli.bench.rounds import in_turns
from lowrank_cli.runs import Run, progress
from lowrank_cli.schema import BenchRun, DecodeBench

__all__ = ["figures", "measure", "metrics"]


def measure(config: BenchRun, run: Run) -> dict[str, Any]:
    """Rows for each method, number of beams and number of adapters in the batch, and for each pair of methods."""
    bench = config.bench
    assert isinstance(bench, DecodeBench)
    base = load_base(config, run, generates=True)
    variants = available_methods(config)
    vllm_variants = {entry: variants.pop(entry) for entry in list(variants) if is_vllm(entry)}
    settings: dict[int | None, dict[str, BenchModel]] = {None: bench_models(base.model, variants, config.seed)}
    if bench.tenants:
        grouped = config.hardware.grouped
        with_tenants = tenant_models(base.model, variants, bench.tenants, bench.batch_size, config.seed, grouped)
        settings.update((count, models) for count, models in with_tenants.items())
    total = len(bench.beams) * (bench.rounds + 1) * len(settings) * (len(variants) + len(vllm_variants))
    with (
        vllm.served(base.model, vllm_variants, config, list(settings), run.file("vllm.log")) as served,
        autocast(config),
        progress.bar("measuring", total, shown=True) as bar,
    ):
        settings = {count: models | served[count] for count, models in settings.items()}
        prompts = torch.randint(base.vocabulary, (bench.batch_size, bench.prompt_length)).to(base.device)
        rows = compare(settings, prompts, bench, bar)
    return {**base.facts, "memory": memory_meaning(base.device, "generation"), **rows}


def compare(
    settings: Mapping[int | None, Mapping[str, BenchModel]], prompts: Tensor, bench: DecodeBench, bar: progress.Bar
) -> dict[str, list[dict[str, Any]]]:
    """Rows for each method, number of beams and number of adapters in the batch, and each pair of methods."""
    rows, pairs = [], []
    present = [bench_model for models in settings.values() for bench_model in models.values()]
    for beams in bench.beams:
        for tenants, models in settings.items():
            cell = rounds(models, present, prompts, bench, beams, bar)
            setting = {"beams": beams, "tenants": tenants}
            rows += [{**row(bench, name, models[name], cell), **setting} for name in models]
            pairs += [{**pair, **setting} for pair in compared(cell)]
    return {"rows": rows, "pairs": pairs}


def rounds(
    models: Mapping[str, BenchModel],
    present: Sequence[BenchModel],
    prompts: Tensor,
    bench: DecodeBench,
    beams: int,
    bar: progress.Bar,
) -> dict[str, list[Sample]]:
    """The samples of each method, round by round."""

    def sample(bench_model: BenchModel) -> Sample:
        if isinstance(bench_model, vllm.Served):
            return bench_model.sample(prompts, bench.new_tokens)
        return generate(bench_model, prompts, beams, bench.new_tokens)

    return in_turns(models, present, bench.rounds, sample, bar)


def generate(bench_model: BenchModel, prompts: Tensor, beams: int, new_tokens: int) -> Sample:
    """Time one call of ``generate`` on prompts (B, T) of equal length, the setup for their batch included."""
    reset_peak(prompts.device)
    clock = Clock(prompts.device)
    began = clock.now()
    model = bench_model.model if isinstance(bench_model.model, PreTrainedModel) else bench_model.model.get_base_model()
    cache = growing_cache(model, new_tokens) if beams == 1 else {}
    with bench_model.context():
        tokens = bench_model.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            use_cache=True,
            stopping_criteria=StoppingCriteriaList([clock]),
            **cache,
            **bench_model.arguments,
        )
    ended = clock.now()
    assert tokens.shape[1] == prompts.shape[1] + new_tokens
    steps, cpu_steps = ([b - a for a, b in pairwise(times)] for times in (clock.times, clock.cpu_times))
    return Sample(ended - began, clock.times[0] - began, steps, peak_memory(prompts.device), cpu_steps)


@dataclass
class Clock(StoppingCriteria):
    """Records the time of each token; never stops the generation."""

    device: torch.device
    times: list[float] = field(default_factory=list)
    cpu_times: list[float] = field(default_factory=list)  #: processor time of the process

    def now(self) -> float:
        synchronized(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(self.now())
        self.cpu_times.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
