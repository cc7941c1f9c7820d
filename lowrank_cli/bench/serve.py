"""``lrk bench serve``: our server under load, and vLLM's: requests per second, and how long tokens take.

Servers run in processes of their own on the same weights and adapters; requests, arrivals and the client are the same
for all. Entries are measured in turn, so that a slow phase of the machine affects all of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch

import lowrank_cli
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.files.export import as_lora, save_lora
from lowrank_cli.bench.base_model import BaseModel, load_base
from lowrank_cli.bench.bench_models import adapted_copy, different
from lowrank_cli.bench.entries import available_methods, is_vllm
from lowrank_cli.bench.http_load import HOST, Trace, arrivals, send
from lowrank_cli.bench.rounds import interleaved, ratio
from lowrank_cli.bench.server_process import ServerProcess
from lowrank_cli.bench.vllm import ENVIRONMENT
from lowrank_cli.errors import UserError
from lowrank_cli.models.load import quiet
from lowrank_cli.reader import read_json
from lowrank_cli.runs import Run, progress
from lowrank_cli.runs.vllm_command import rank_step
from lowrank_cli.schema import BASE, VLLM, VLLM_LORA, BenchRun, ServeBench

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Target:
    """An entry of ``bench.methods``: a server, and the names of the models that answer there."""

    server: ServerProcess
    models: Sequence[str]  #: as many as the largest of ``bench.tenants``, or one for all


@dataclass(frozen=True)
class Sample:
    """One round of requests."""

    traces: Sequence[Trace]
    cpu_seconds: float  #: of the server

    @property
    def tokens(self) -> int:
        return sum(trace.tokens for trace in self.traces)

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(trace.last for trace in self.traces) - min(trace.sent for trace in self.traces)


def measure(config: BenchRun, run: Run) -> dict[str, Any]:
    """A row for each entry, number of tenants and rate of arrivals.

    Raises:
        UserError: the extra serve is not installed, or the model has no tokenizer.
        WorkFailed: a server does not start, or fails.
    """
    bench = config.bench
    assert isinstance(bench, ServeBench)
    if importlib.util.find_spec("uvicorn") is None:
        raise UserError("bench: lrk bench serve needs the extra serve: pip install 'lowrank-cli[serve]'")
    base = load_base(config, run)
    rows = []
    with TemporaryDirectory(prefix="lrk-serve-") as name, _targets(config, base, Path(name), run) as targets:
        cells = [(count, rate) for count in bench.tenants for rate in bench.rates]
        with progress.bar("measuring", len(cells) * len(targets) * (bench.rounds + 1), shown=True) as bar:
            for count, rate in cells:
                bodies = _bodies(bench, base.vocabulary, config.seed)
                times = arrivals(bench.requests, rate, config.seed)
                work = {entry: partial(_sample, target, count, bodies, times) for entry, target in targets.items()}
                samples = interleaved(work, bench.rounds, bar)
                rows += [_row(entry, count, rate, samples) for entry in samples]
    rates = [None if rate == float("inf") else rate for rate in bench.rates]  # JSON has no infinity
    return {**base.facts, "bench": {**vars(bench), "rates": rates}, "rows": rows}


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Flat numbers, ``bench/<method>/tenants_<n>/rate_<rate>/<what>``."""
    named = ("method", "tenants", "rate")
    return {
        f"bench/{row['method']}/tenants_{row['tenants']}/rate_{rate_text(row['rate'])}/{key}": value
        for row in record["rows"]
        for key, value in row.items()
        if key not in named and isinstance(value, (int, float))
    }


def figures(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A plot for each number of tenants: the time per token over the rates."""
    bench = record["bench"]
    names = list(dict.fromkeys(row["method"] for row in record["rows"]))
    rates = list(dict.fromkeys(row["rate"] for row in record["rows"]))
    rows = {(row["method"], row["tenants"], row["rate"]): row for row in record["rows"]}
    return [
        {
            "file": f"serve_{count}.png",
            "kind": "bars",
            "title": f"{count} adapter{'s' * (count > 1)} on one server, {bench['max_rows']} answers at a time",
            "rows": names,
            "columns": [f"{rate_text(rate)} requests/s" for rate in rates],
            **{
                key: [[rows[name, count, rate][f"ms_per_token_{of}"] for rate in rates] for name in names]
                for key, of in (("values", "p50"), ("low", "p50"), ("high", "p95"))
            },
            "label": "ms per token (median and 95th percentile of requests)",
        }
        for count in bench["tenants"]
    ]


def rate_text(rate: float | None) -> str:
    """A rate of a record; None is all requests at once."""
    return "all" if rate is None else f"{rate:g}"


def _bodies(bench: ServeBench, vocabulary: int, seed: int) -> list[dict[str, Any]]:
    """Requests with random prompts, whose answers all have the same length."""
    draw, first = random.Random(seed), min(10, vocabulary // 2)  # without the special tokens
    return [
        {
            "prompt": [draw.randrange(first, vocabulary) for _ in range(bench.prompt_length)],
            "max_tokens": bench.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        for _ in range(bench.requests)
    ]


def _sample(target: Target, count: int, bodies: Sequence[dict[str, Any]], times: Sequence[float]) -> Sample:
    """One round: the requests ask ``count`` of the target's models in turn."""
    models = target.models[:count]
    asked = [{**body, "model": models[at % len(models)]} for at, body in enumerate(bodies)]
    before = target.server.cpu_seconds
    traces = send(target.server.port, asked, times)
    return Sample(traces, target.server.cpu_seconds - before)


def _row(entry: str, tenants: int, rate: float, samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    own = samples[entry]
    traces = [trace for sample in own for trace in sample.traces]
    firsts = [1000 * (trace.first - trace.sent) for trace in traces]
    each = [1000 * trace.seconds_per_token for trace in traces]
    row = {
        "method": entry,
        "tenants": tenants,
        "rate": None if rate == float("inf") else rate,
        "requests_per_second": statistics.median(len(sample.traces) / sample.seconds for sample in own),
        "tokens_per_second": statistics.median(sample.tokens / sample.seconds for sample in own),
        **{f"first_token_ms_p{p}": float(numpy.percentile(firsts, p)) for p in PERCENTILES},
        **{f"ms_per_token_p{p}": float(numpy.percentile(each, p)) for p in PERCENTILES},
        "cpu_ms_per_token": statistics.median(1000 * sample.cpu_seconds / sample.tokens for sample in own),
        **_compared("", own, samples[BASE]),
        "seconds": [sample.seconds for sample in own],
    }
    counterpart = VLLM if entry in (BASE, VLLM) else VLLM_LORA
    theirs = next((other for name, other in samples.items() if name.split()[0] == counterpart), None)
    return row if theirs is None else {**row, **_compared("vllm_", own, theirs)}


def _compared(prefix: str, own: Sequence[Sample], reference: Sequence[Sample]) -> dict[str, Any]:
    """Tokens per second, time per token and processor time per token, relative to ``reference``."""
    speed, quartiles = ratio(own, reference, lambda sample: sample.tokens / sample.seconds)
    step, step_quartiles = ratio(own, reference, lambda s: statistics.median(t.seconds_per_token for t in s.traces))
    cpu, cpu_quartiles = ratio(own, reference, lambda sample: max(sample.cpu_seconds, 1e-9) / sample.tokens)
    return {
        f"{prefix}ratio": speed,
        f"{prefix}ratio_quartiles": quartiles,
        f"{prefix}step_ratio": step,
        f"{prefix}step_ratio_quartiles": step_quartiles,
        f"{prefix}cpu_ratio": cpu,
        f"{prefix}cpu_ratio_quartiles": cpu_quartiles,
    }


@contextmanager
def _targets(config: BenchRun, base: BaseModel, folder: Path, run: Run) -> Iterator[dict[str, Target]]:
    """Every entry with its server, while the context is open."""
    bench = config.bench
    assert isinstance(bench, ServeBench)
    if base.tokenizer is None:
        raise UserError("model.shape: lrk bench serve needs a tokenizer; set model.shape=null and a model")
    model = folder / BASE
    with quiet(True):
        base.model.save_pretrained(model)
    base.tokenizer.save_pretrained(model)
    entries = available_methods(config)
    adapters = {
        entry: _saved(base, entry, variant, config, folder / str(number))
        for number, (entry, variant) in enumerate(entries.items())
        if variant is not None
    }
    ours = {name: path for entry, saved in adapters.items() if not is_vllm(entry) for name, path in saved.items()}
    with ExitStack() as undo:
        server = undo.enter_context(_ours(config, model, ours, folder, run.path / "server.log"))
        targets = {}
        for entry in entries:
            names = [*adapters.get(entry, [BASE])]
            if is_vllm(entry):
                made = _vllm(config, model, adapters.get(entry, {}), run.path / "vllm.log")
                targets[entry] = Target(undo.enter_context(made), names)
            else:
                targets[entry] = Target(server, names)
        yield targets


def _saved(base: BaseModel, entry: str, variant: Any, config: BenchRun, folder: Path) -> dict[str, Path]:
    """Different adapters of an entry in ``folder``, by name; for vLLM they are exported."""
    assert isinstance(config.bench, ServeBench)
    adapter = adapted_copy(base.model, entry, variant, config.seed).adapter
    assert adapter is not None
    saved = {}
    for number in different(adapter, max(config.bench.tenants)):
        path = folder / str(number)
        path.mkdir(parents=True)
        if is_vllm(entry):
            save_lora(adapter, as_lora(adapter, None)[0], path)
        else:
            save_load.save(adapter, path, {"method_config": vars(variant)})
        saved[f"{folder.name}-{number}"] = path
    return saved


def _ours(config: BenchRun, model: Path, adapters: Mapping[str, Path], folder: Path, log: Path) -> ServerProcess:
    bench = config.bench
    assert isinstance(bench, ServeBench)
    hardware = {**vars(config.hardware), "threads": torch.get_num_threads()}
    settings = {
        "model": str(model),
        "method": "none",
        "outputs": str(folder / "outputs"),
        **{f"hardware.{key}": value for key, value in hardware.items() if key != "name"},
        "serve.port": "{port}",
        "serve.max_rows": bench.max_rows,
        "serve.max_waiting": bench.requests,
        "serve.max_length": bench.prompt_length + bench.new_tokens,
    }
    if adapters:
        tenants = folder / "tenants.jsonl"
        lines = [json.dumps({"name": name, "tenant": str(path)}) + "\n" for name, path in adapters.items()]
        tenants.write_text("".join(lines))
        settings["serve.tenants"] = str(tenants)
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    package = str(Path(lowrank_cli.__file__).parents[1])
    found = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return ServerProcess([sys.executable, "-m", "lowrank_cli", "serve", *words], {"PYTHONPATH": found}, log)


def _vllm(config: BenchRun, model: Path, adapters: Mapping[str, Path], log: Path) -> ServerProcess:
    bench = config.bench
    assert isinstance(bench, ServeBench)
    length = bench.prompt_length + bench.new_tokens
    command = [str(bench.vllm), "-I", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", HOST, "--port", "{port}", "--served-model-name", BASE, "--seed", str(config.seed)]
    command += ["--enforce-eager", "--no-enable-prefix-caching", "--disable-log-stats"]
    command += ["--dtype", "bfloat16" if config.hardware.precision == "bf16" else "float32"]
    command += ["--max-model-len", str(length), "--max-num-seqs", str(bench.max_rows)]
    command += ["--max-num-batched-tokens", str(max(length, bench.max_rows * bench.prompt_length))]
    if adapters:
        rank = max(read_json(path / save_load.CONFIG, dict[str, Any])["r"] for path in adapters.values())
        command += ["--enable-lora", "--max-lora-rank", str(rank_step(rank) or rank)]
        command += ["--max-loras", str(min(len(adapters), bench.max_rows)), "--max-cpu-loras", str(len(adapters))]
        command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": ""}
    return ServerProcess(command, environment, log)
