"""``lrk bench decode``: generation with adapters that are not merged, against the bare model, in interleaved rounds.

All methods stand on one set of frozen weights. A round runs each of them once, in an order that rotates from round to
round; a first round is not counted. Ratios are taken within a round, so that what slows the machine down for a while
slows both sides, and the median over rounds is reported with its quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from lowrank_cli.methods.protocol import Observes
from lowrank_cli.models.load import load
from lowrank_cli.models.shape import random_model
from lowrank_cli.runs import Run
from lowrank_cli.runs.process import peak_memory_bytes, reset_peak_memory
from lowrank_cli.schema import BenchConfig, BenchRun
from lowrank_cli.stages import progress
from lowrank_cli.stages.session import prepare
from lowrank_cli.stages.twins import Twin, twins

BASE = "base"
MEMORY = {
    "cuda": "largest allocation on the device during a generation, without the other methods' adapters",
    "cpu": "largest resident size of the process during a generation, without the other methods' adapters",
}


@dataclass
class Sample:
    """One generation: its times in seconds, its peak memory in bytes."""

    seconds: float  #: of the whole call
    first: float  #: until the first token
    steps: list[float]  #: each later token
    memory: int


def run(config: BenchRun, run: Run, *, resume: bool = False) -> dict[str, float]:
    """Measure, and write ``bench.json`` and ``figures.json``. Resumed, it starts again."""
    bench, device = config.bench, prepare(config.hardware).device
    torch.manual_seed(config.seed)
    base, header = _base(config, device)
    progress.console().print(header)
    models = twins(base, config.variants, config.seed)
    prompts = torch.randint(base.config.vocab_size, (bench.batch_size, bench.prompt_length)).to(device)
    total = len(bench.beams) * (bench.rounds + 1) * len(models)
    cells = {}
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=config.hardware.precision == "autocast"),
        progress.bar("measuring", total, shown=True) as bar,
    ):
        for beams in bench.beams:
            cells[beams] = rounds(models, prompts, bench, beams, bar)
    rows = [_row(bench, beams, name, models[name], cells[beams]) for beams in bench.beams for name in models]
    if device.type == "cuda":
        memory = max(row["peak_memory_bytes"] for row in rows)
        run.update(device=torch.cuda.get_device_name(device), device_memory_bytes=memory)
    record = {
        **{key: run.info[key] for key in ("command", "git", "device", "packages", "python", "platform")},
        "model": header,
        "precision": config.hardware.precision,
        "threads": torch.get_num_threads(),
        "memory": MEMORY[device.type],
        "bench": vars(bench),
        "variants": run.config()["variants"],
        "rows": rows,
        "pairs": [pair for beams in bench.beams for pair in _pairs(beams, cells[beams])],
    }
    run.write_json("bench.json", record)
    run.write_json("figures.json", figures(record))
    return metrics(rows)


def _base(config: BenchRun, device: torch.device) -> tuple[PreTrainedModel, str]:
    """The model on its device, set to generate as many tokens as it is asked for, and the line that names it."""
    if config.model.shape:
        model = random_model(config.model, config.hardware, device)
        count = sum(parameter.numel() for parameter in model.parameters())
        header = f"random weights of shape {config.model.shape}: {count / 1e6:.0f}M-parameter Llama"
    else:
        loaded = load(config.model, config.hardware, None)
        model, header = loaded.model.to(device).eval(), loaded.header
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model, header


def rounds(
    models: Mapping[str, Twin], prompts: Tensor, bench: BenchConfig, beams: int, bar: progress.Bar
) -> dict[str, list[Sample]]:
    """The samples of each method, round by round."""
    names = list(models)
    found: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(bench.rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            others = sum(twin.own_bytes for twin in models.values()) - models[name].own_bytes
            sample = generate(models[name].model, prompts, beams, bench.new_tokens)
            sample.memory -= others
            if number:
                found[name].append(sample)
            bar.advance()
    return found


def generate(model: PreTrainedModel, prompts: Tensor, beams: int, new_tokens: int) -> Sample:
    """Time one call of ``generate`` on prompts (B, T) of equal length."""
    _reset_peak(prompts.device)
    clock = Clock(prompts.device)
    began = clock.now()
    made = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        num_beams=beams,
        do_sample=False,
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    ended = clock.now()
    assert made.shape[1] == prompts.shape[1] + new_tokens
    steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return Sample(ended - began, clock.times[0] - began, steps, _peak(prompts.device))


@dataclass
class Clock(StoppingCriteria):
    """Notes the time of each token, and never stops."""

    device: torch.device
    times: list[float] = field(default_factory=list)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak_memory()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def _row(bench: BenchConfig, beams: int, name: str, twin: Twin, cell: Mapping[str, list[Sample]]) -> dict[str, Any]:
    """One method with one number of beams."""
    samples = cell[name]
    tokens = bench.batch_size * bench.new_tokens
    parameters = twin.adapter.count() if twin.adapter else 0
    return {
        "method": name,
        "beams": beams,
        "tokens_per_second": statistics.median(tokens / sample.seconds for sample in samples),
        **_ratio(samples, cell[BASE]),
        "ms_per_token": 1000 * statistics.median(step for sample in samples for step in sample.steps),
        "first_token_seconds": statistics.median(sample.first for sample in samples),
        "peak_memory_bytes": max(sample.memory for sample in samples),
        "parameters": parameters,
        "activated_parameters": _activated(twin, parameters),
        "seconds": [sample.seconds for sample in samples],
    }


def _activated(twin: Twin, parameters: int) -> int:
    """What the method says that a prompt used, on average."""
    if twin.adapter is None or not isinstance(twin.method, Observes):
        return parameters
    observed, _ = twin.method.observations(twin.adapter, lambda counts: counts)
    return int(observed.get("activated_parameters", parameters))


def _ratio(samples: Sequence[Sample], reference: Sequence[Sample]) -> dict[str, Any]:
    """Speed relative to ``reference`` within each round: the median, and the quartiles."""
    ratios = [other.seconds / sample.seconds for sample, other in zip(samples, reference, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"ratio": statistics.median(ratios), "ratio_quartiles": [low, high]}


def _pairs(beams: int, cell: Mapping[str, list[Sample]]) -> list[dict[str, Any]]:
    """Speed of each method relative to each other one."""
    return [
        {"method": name, "to": other, "beams": beams, **_ratio(cell[name], cell[other])}
        for name in cell
        for other in cell
        if name != other and BASE not in (name, other)
    ]


def metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Flat numbers, ``bench/<method>/beams_<n>/<what>``."""
    plain = ("tokens_per_second", "ratio", "ms_per_token", "first_token_seconds", "peak_memory_bytes", "parameters")
    return {f"bench/{row['method']}/beams_{row['beams']}/{key}": row[key] for row in rows for key in plain}


def figures(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars of the ratios to the base, and their quartiles."""
    rows, beams, bench = record["rows"], record["bench"]["beams"], record["bench"]
    names = list(dict.fromkeys(row["method"] for row in rows))

    def by_name(value: Any) -> list[list[float]]:
        return [[value(row) for row in rows if row["method"] == name] for name in names]

    return [
        {
            "file": "decode.png",
            "kind": "bars",
            "title": f"Decoding speed relative to the bare model ({record['device']}, batch {bench['batch_size']})",
            "rows": names,
            "columns": [f"{count} beam{'s' * (count > 1)}" for count in beams],
            "values": by_name(lambda row: row["ratio"]),
            "low": by_name(lambda row: row["ratio_quartiles"][0]),
            "high": by_name(lambda row: row["ratio_quartiles"][1]),
            "label": "tokens/s, × base (median, quartiles)",
        }
    ]
