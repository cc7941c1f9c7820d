"""The results of ``lrk bench decode`` from its samples: a row for each method, flat metrics and figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy

from lowrank_cli.bench.bench_models import BenchModel
from lowrank_cli.bench.rounds import ratio
from lowrank_cli.methods.protocol import Observes
from lowrank_cli.schema import BASE, VLLM, VLLM_LORA, DecodeBench


@dataclass
class Sample:
    """One generation: its times in seconds, its peak memory in bytes."""

    seconds: float  #: of the whole call
    first: float  #: until the first token
    steps: list[float]  #: each later token
    memory: int
    cpu_steps: list[float] = field(default_factory=list)  #: processor time of each later token


def row(bench: DecodeBench, name: str, bench_model: BenchModel, cell: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """One method in one setting, next to the others of ``cell``."""
    samples = cell[name]
    tokens = bench.batch_size * bench.new_tokens
    steps = [step for sample in samples for step in sample.steps]
    return {
        "method": name,
        "tokens_per_second": statistics.median(tokens / sample.seconds for sample in samples),
        **speed_ratio(samples, cell[BASE]),
        "ms_per_token": 1000 * statistics.median(steps),
        "ms_per_token_p95": 1000 * float(numpy.percentile(steps, 95)),
        "cpu_ms_per_token": 1000 * statistics.median(step for sample in samples for step in sample.cpu_steps),
        "step_ratio": step_ratio(samples, cell[BASE], "steps"),
        "cpu_step_ratio": step_ratio(samples, cell[BASE], "cpu_steps"),
        **_to_vllm(bench_model, cell, samples),
        "first_token_seconds": statistics.median(sample.first for sample in samples),
        "peak_memory_bytes": max(sample.memory for sample in samples),
        "parameters": bench_model.parameters,
        "activated_parameters": _activated(bench_model),
        "modules": bench_model.modules,
        "adapters_bytes": bench_model.adapters_bytes,
        "adapter_bytes": bench_model.adapters_bytes // bench_model.adapters,
        "seconds": [sample.seconds for sample in samples],
    }


def _activated(bench_model: BenchModel) -> int | None:
    """Parameters that the method activated for a prompt, on average; None for a bank, which does not count them."""
    if bench_model.adapter is None:
        return None if bench_model.adapters_bytes else bench_model.parameters
    if not isinstance(bench_model.method, Observes):
        return bench_model.parameters
    observed, _ = bench_model.method.observations(bench_model.adapter, lambda counts: counts)
    return int(observed.get("activated_parameters", bench_model.parameters))


def step_ratio(samples: Sequence[Sample], reference: Sequence[Sample], times: str) -> float:
    """The time of a decoding step, without the prompt, relative to ``reference``.

    Args:
        times: the attribute of :class:`Sample` to compare, ``steps`` or ``cpu_steps``.
    """
    return ratio(samples, reference, lambda sample: statistics.median(getattr(sample, times)))[0]


def _to_vllm(
    bench_model: BenchModel, cell: Mapping[str, Sequence[Sample]], samples: Sequence[Sample]
) -> dict[str, float]:
    """A step's time relative to vLLM's, with LoRAs or (for the bare model) without, if that is measured."""
    counterpart = VLLM_LORA if bench_model.modules else VLLM
    other = next((theirs for name, theirs in cell.items() if name.split()[0] == counterpart), None)
    if other is None:
        return {}
    return {
        "vllm_step_ratio": step_ratio(samples, other, "steps"),
        "vllm_cpu_step_ratio": step_ratio(samples, other, "cpu_steps"),
    }


def speed_ratio(samples: Sequence[Sample], reference: Sequence[Sample]) -> dict[str, Any]:
    """Speed relative to ``reference``: the median and the quartiles over the rounds."""
    median, quartiles = ratio(samples, reference, lambda sample: 1 / sample.seconds)
    return {"ratio": median, "ratio_quartiles": quartiles}


def compared(cell: Mapping[str, Sequence[Sample]]) -> list[dict[str, Any]]:
    """Speed of each method relative to each other one."""
    pairs = permutations((name for name in cell if name != BASE), 2)
    return [{"method": name, "to": other, **speed_ratio(cell[name], cell[other])} for name, other in pairs]


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Flat numbers, ``bench/<method>/beams_<n>[/tenants_<n>]/<what>``."""
    keys = (
        "tokens_per_second",
        "ratio",
        "ms_per_token",
        "ms_per_token_p95",
        "cpu_ms_per_token",
        "step_ratio",
        "cpu_step_ratio",
        "vllm_step_ratio",
        "vllm_cpu_step_ratio",
        "first_token_seconds",
        "peak_memory_bytes",
        "parameters",
    )

    def setting(row: dict[str, Any]) -> str:
        return f"beams_{row['beams']}" + (f"/tenants_{row['tenants']}" if row["tenants"] else "")

    return {
        f"bench/{row['method']}/{setting(row)}/{key}": row[key] for row in record["rows"] for key in keys if key in row
    }


def figures(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Plots: ratios to the base as bars; ms per token over tenants, and over the modules that a method keeps."""
    alone = [row for row in record["rows"] if row["tenants"] is None]
    plots = [_bars(record, alone)]
    if record["bench"]["tenants"]:
        plots.append(_over_tenants(record))
    kept = {(row["method"].split()[0], row["modules"]) for row in alone if row["method"] != BASE}
    swept = [name for name in dict(kept) if sum(name == method for method, _ in kept) > 1]
    if swept:
        plots.append(_over_modules(record, swept))
    return plots


def shown(name: str) -> str:
    """An entry of ``bench.methods`` without the folders of its files."""
    return re.sub(r"=\S*/", "=", name)


def _bars(record: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    beams, bench = record["bench"]["beams"], record["bench"]
    names = list(dict.fromkeys(row["method"] for row in rows))

    def by_name(value: Any) -> list[list[float]]:
        return [[value(row) for row in rows if row["method"] == name] for name in names]

    return {
        "file": "decode.png",
        "kind": "bars",
        "title": f"Decoding speed relative to the bare model ({record['device']}, batch {bench['batch_size']})",
        "rows": list(map(shown, names)),
        "columns": [f"{count} beam{'s' * (count > 1)}" for count in beams],
        "values": by_name(lambda row: row["ratio"]),
        "low": by_name(lambda row: row["ratio_quartiles"][0]),
        "high": by_name(lambda row: row["ratio_quartiles"][1]),
        "label": "tokens/s, × base (median, quartiles)",
    }


def _over_tenants(record: dict[str, Any]) -> dict[str, Any]:
    beams, counts = record["bench"]["beams"][0], record["bench"]["tenants"]
    rows = [row for row in record["rows"] if row["beams"] == beams and row["tenants"]]
    names = list(dict.fromkeys(row["method"] for row in rows))
    return {
        "file": "tenants.png",
        "kind": "lines",
        "title": f"A decoding step of {record['bench']['batch_size']} rows that share the model ({record['device']})",
        "rows": list(map(shown, names)),
        "columns": counts,
        "values": [[row["ms_per_token"] for row in rows if row["method"] == name] for name in names],
        "label": "ms per token (median)",
        "column_label": "adapters in the batch",
    }


def _over_modules(record: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A line for each method and number of adapters in the batch; the base has 0 modules.

    Settings with the same number of modules are one point, their median.
    """
    beams, counts = record["bench"]["beams"][0], [None, *record["bench"]["tenants"]]
    rows = [row for row in record["rows"] if row["beams"] == beams and row["method"].split()[0] in (BASE, *names)]
    columns = sorted({row["modules"] for row in rows})

    def value(name: str, count: int | None, modules: int) -> float | None:
        matching = [row for row in rows if row["method"].split()[0] in (BASE, name) and row["tenants"] == count]
        times = [row["ms_per_token"] for row in matching if row["modules"] == modules]
        return statistics.median(times) if times else None

    lines = {
        (name, count): name if count is None else f"{name}, {count} in a batch" for name in names for count in counts
    }
    return {
        "file": "modules.png",
        "kind": "lines",
        "title": f"A decoding step against the modules that are kept ({record['device']})",
        "rows": list(lines.values()),
        "columns": [modules / record["layers"] for modules in columns],
        "values": [[value(name, count, modules) for modules in columns] for name, count in lines],
        "label": "ms per token (median)",
        "column_label": "modules of a layer",
    }
