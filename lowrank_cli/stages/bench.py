"""``lrk bench``: methods against the bare model, all on one set of frozen weights, in interleaved rounds.

``decode`` is generation with adapters that are not merged, and with ``bench.tenants`` the same once more for each
number of adapters in a batch; ``train`` is in :mod:`lowrank_cli.bench.train_step`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lowrank_cli.adapter.kv_cache import growing_cache
from lowrank_cli.bench import decode_rows, train_step, vllm
from lowrank_cli.bench.decode_rows import Sample, compared, row
from lowrank_cli.bench.rounds import in_turns, peak_memory, reset_peak, synchronized
from lowrank_cli.bench.shared_weights import Twin, crowds, lacking, twins
from lowrank_cli.inference import progress
from lowrank_cli.inference.device import greet, prepare
from lowrank_cli.models.load import load
from lowrank_cli.models.shape import random_model
from lowrank_cli.runs import Run
from lowrank_cli.schema import VLLM, VLLM_LORA, BenchConfig, BenchRun

MEMORY = {
    "cuda": "largest allocation on the device during a {}, without the other methods' adapters",
    "cpu": "largest resident size of the process during a {}, without the other methods' adapters",
}


def run(config: BenchRun, run: Run, *, resume: bool = False) -> dict[str, float]:
    """Measure, and write ``bench.json`` and ``figures.json``. Resumed, it starts again."""
    bench, device = config.bench, prepare(config.hardware).device
    torch.manual_seed(config.seed)
    base, header, packing, tokenizer = _base(config, device)
    greet(run, config.hardware, base, header, packing=packing)
    variants = _obtainable(config, device)
    training = bench.measure == "train"
    batch = train_step.batch_of(config, base.config.get_text_config().vocab_size, tokenizer) if training else {}
    elsewhere = {entry: variants.pop(entry) for entry in list(variants) if is_vllm(entry)}
    settings: dict[int | None, dict[str, Twin]] = {None: twins(base, variants, config.seed)}
    if bench.tenants:
        grouped = config.hardware.grouped
        settings |= crowds(base, variants, bench.tenants, bench.batch_size, config.seed, grouped)
    methods = len(variants) + len(elsewhere)
    total = (1 if training else len(bench.beams)) * (bench.rounds + 1) * len(settings) * methods
    with (
        vllm.served(base, elsewhere, config, list(settings), run.file("vllm.log")) as served,
        torch.autocast(device.type, torch.bfloat16, enabled=config.hardware.precision == "autocast"),
        progress.bar("measuring", total, shown=True) as bar,
    ):
        settings = {count: models | served[count] for count, models in settings.items()}
        if training:
            batch = {key: value.to(device) for key, value in batch.items()}
            found = {
                "rows": train_step.measure(settings[None], batch, config, bar),
                "data": train_step.described(batch, config),
            }
        else:
            ids = torch.randint(base.config.get_text_config().vocab_size, (bench.batch_size, bench.prompt_length))
            found = decode(settings, ids.to(device), bench, bar)
    if device.type == "cuda":
        memory = max(row["peak_memory_bytes"] for row in found["rows"])
        run.update(device=torch.cuda.get_device_name(device), device_memory_bytes=memory)
    record = {
        **{key: run.info[key] for key in ("command", "git", "device", "packages", "python", "platform")},
        "model": header,
        "precision": config.hardware.precision,
        "quantization": config.hardware.quantization,
        "grouped": config.hardware.grouped,
        "packing": packing,
        "layers": base.config.num_hidden_layers,
        "threads": torch.get_num_threads(),
        "memory": MEMORY[device.type].format("step" if training else "generation"),
        "bench": vars(bench),
        "variants": run.config()["variants"],
        **found,
    }
    made = train_step if training else decode_rows
    run.write_json("bench.json", record)
    run.write_json("figures.json", made.figures(record))
    return made.metrics(found["rows"])


def decode(
    settings: Mapping[int | None, Mapping[str, Twin]], prompts: Tensor, bench: BenchConfig, bar: progress.Bar
) -> dict[str, list[dict[str, Any]]]:
    """Rows for each method, number of beams and number of adapters in the batch, and each pair of methods."""
    rows, pairs = [], []
    present = [twin for models in settings.values() for twin in models.values()]
    for beams in bench.beams:
        for tenants, models in settings.items():
            cell = rounds(models, present, prompts, bench, beams, bar)
            setting = {"beams": beams, "tenants": tenants}
            rows += [{**row(bench, name, models[name], cell), **setting} for name in models]
            pairs += [{**pair, **setting} for pair in compared(cell)]
    return {"rows": rows, "pairs": pairs}


def _obtainable(config: BenchRun, device: torch.device) -> dict[str, Any]:
    """The entries of ``bench.methods`` that can be measured here; says which are left out, and why."""
    why = {entry: lacking(entry, device.type) for entry in config.variants}
    if config.bench.vllm is None:
        why |= {entry: "bench.vllm names no Python that has vLLM" for entry in config.variants if is_vllm(entry)}
    for entry, reason in why.items():
        if reason:
            progress.console().print(f"'{entry}' is left out: {reason}")
    return {entry: variant for entry, variant in config.variants.items() if not why[entry]}


def is_vllm(entry: str) -> bool:
    """Whether an entry of ``bench.methods`` is vLLM's."""
    return entry.split()[0] in (VLLM, VLLM_LORA)


def _base(config: BenchRun, device: torch.device) -> tuple[PreTrainedModel, str, str, PreTrainedTokenizerBase | None]:
    """The model on its device, set to generate as many tokens as it is asked for, the line that names it, the one on
    its packed weights, and its tokenizer, if it has one."""
    tokenizer, generates = None, config.bench.measure == "decode"
    if config.model.shape:
        model, packing = random_model(config.model, config.hardware, device, generates)
        count = sum(parameter.numel() for parameter in model.parameters())
        header = f"random weights of shape {config.model.shape}: {count / 1e6:.0f}M-parameter Llama"
    else:
        loaded = load(config.model, config.hardware, None, generates=generates)
        model, header, tokenizer = loaded.model.to(device).eval(), loaded.header, loaded.tokenizer
        packing = loaded.packing
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model, header, packing, tokenizer


def rounds(
    models: Mapping[str, Twin],
    present: Sequence[Twin],
    prompts: Tensor,
    bench: BenchConfig,
    beams: int,
    bar: progress.Bar,
) -> dict[str, list[Sample]]:
    """The samples of each method, round by round."""

    def sample(twin: Twin) -> Sample:
        if isinstance(twin, vllm.Served):
            return twin.sample(prompts, bench.new_tokens)
        return generate(twin, prompts, beams, bench.new_tokens)

    return in_turns(models, present, bench.rounds, sample, bar)


def generate(twin: Twin, prompts: Tensor, beams: int, new_tokens: int) -> Sample:
    """Time one call of ``generate`` on prompts (B, T) of equal length, with all that a batch of them needs."""
    reset_peak(prompts.device)
    clock = Clock(prompts.device)
    began = clock.now()
    model = twin.model if isinstance(twin.model, PreTrainedModel) else twin.model.get_base_model()
    cache = growing_cache(model, new_tokens) if beams == 1 else {}
    with twin.around():
        made = twin.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            use_cache=True,
            stopping_criteria=StoppingCriteriaList([clock]),
            **cache,
            **twin.arguments,
        )
    ended = clock.now()
    assert made.shape[1] == prompts.shape[1] + new_tokens
    steps, cpu_steps = ([b - a for a, b in pairwise(times)] for times in (clock.times, clock.cpu_times))
    return Sample(ended - began, clock.times[0] - began, steps, peak_memory(prompts.device), cpu_steps)


@dataclass
class Clock(StoppingCriteria):
    """Notes the time of each token, and never stops."""

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
