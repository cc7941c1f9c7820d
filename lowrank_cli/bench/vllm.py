"""vLLM in ``lrk bench decode``: the same weights and prompts, and our LoRAs as ``lrk export`` writes them.

Each entry runs in its own process of the Python that ``bench.vllm`` names, because an engine with LoRA enabled computes
the bare model differently from one without.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cli.adapter.files.export import as_lora, save_lora
from lowrank_cli.bench.bench_models import BenchModel, adapted_copy, different
from lowrank_cli.bench.decode_rows import Sample
from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.models.load import quiet
from lowrank_cli.schema import BenchRun, DecodeBench

WORKER = Path(__file__).with_name("vllm_worker.py")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  #: values of ``max_lora_rank`` in vLLM 0.32
START_SECONDS = 600  #: for importing vLLM and loading the model
ANSWER_SECONDS = 1800  #: for a batch
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # run the engine in the worker itself, which takes the time
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass
class Served(BenchModel):
    """The base model, or the base model with LoRAs, in a vLLM process."""

    worker: Worker | None = None
    folders: tuple[str | None, ...] = (None,)  #: of the adapters, which alternate over the rows; None is the bare model

    def sample(self, prompts: Tensor, new_tokens: int) -> Sample:
        """Time the continuation of prompts (B, T)."""
        assert self.worker is not None
        rows = prompts.tolist()
        adapters = [self.folders[row % len(self.folders)] for row in range(len(rows))]
        answer = self.worker.ask({"prompts": rows, "adapters": adapters, "new_tokens": new_tokens}, ANSWER_SECONDS)
        return Sample(**answer)


@contextmanager
def served(
    base: PreTrainedModel, variants: Mapping[str, Any], config: BenchRun, counts: Sequence[int | None], log: Path
) -> Iterator[dict[int | None, dict[str, BenchModel]]]:
    """vLLM's models for each number of adapters, by entry, while the context is open.

    Args:
        variants: the method of each of vLLM's entries; None is the bare model.
        counts: numbers of adapters in a batch; None is a single adapter.
        log: receives vLLM's messages.

    Raises:
        UserError: ``bench.vllm`` is not a Python with vLLM, or vLLM does not support the model.
    """
    assert isinstance(config.bench, DecodeBench)
    models: dict[int | None, dict[str, BenchModel]] = {count: {} for count in counts}
    if not variants:
        yield models
        return
    with ExitStack() as undo:
        folder = Path(undo.enter_context(TemporaryDirectory(prefix="lrk-vllm-")))
        with quiet(True):
            base.save_pretrained(folder / "model")
        for entry, variant in variants.items():
            most = max(count or 1 for count in counts)
            paths, bench_model = (
                ([], None) if variant is None else _exported(base, entry, variant, most, config.seed, folder)
            )
            worker = undo.enter_context(
                Worker(str(config.bench.vllm), engine_settings(folder / "model", config, variant, most), log)
            )
            for count in counts:
                if bench_model is None:
                    models[count][entry] = Served(None, worker=worker, separate_process=True)
                    continue
                models[count][entry] = Served(
                    None,
                    parameters=bench_model.parameters,
                    adapters_bytes=bench_model.adapters_bytes * (count or 1),
                    modules=bench_model.modules,
                    adapters=count or 1,
                    separate_process=True,
                    worker=worker,
                    folders=tuple(paths[: count or 1]),
                )
        yield models


def _exported(
    base: PreTrainedModel, entry: str, variant: Any, count: int, seed: int, folder: Path
) -> tuple[list[str], BenchModel]:
    """The folders of ``count`` different exported LoRAs, and the model that made them."""
    bench_model, paths = adapted_copy(base, entry, variant, seed), []
    assert bench_model.adapter is not None
    for number in different(bench_model.adapter, count):
        path = folder / f"{entry.replace(' ', '-')}-{number}"
        path.mkdir()
        save_lora(bench_model.adapter, as_lora(bench_model.adapter, None)[0], path)
        paths.append(str(path))
    return paths, bench_model


def engine_settings(model: Path, config: BenchRun, variant: Any, adapters: int) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM``, sized for the batch and for all its prompts in one pass."""
    bench = config.bench
    assert isinstance(bench, DecodeBench)
    tokens = bench.prompt_length + bench.new_tokens
    settings = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "dtype": "bfloat16" if config.hardware.precision == "bf16" else "float32",
        "max_model_len": tokens,
        "max_num_seqs": bench.batch_size,
        "max_num_batched_tokens": max(tokens, bench.batch_size * bench.prompt_length),
        "seed": config.seed,
    }
    if variant is None:
        return settings
    rank = next((rank for rank in RANKS if rank >= variant.rank), None)
    if rank is None:
        raise UserError(f"bench.rank: {variant.rank} is too large for vLLM (allowed: up to {RANKS[-1]})")
    return settings | {"enable_lora": True, "max_loras": adapters, "max_lora_rank": rank}


class Worker:
    """A process of ``vllm_worker.py``, ready to decode inside a ``with``."""

    def __init__(self, python: str, engine: Mapping[str, Any], log: Path):
        self.python, self.engine, self.log = python, engine, log

    def __enter__(self) -> Worker:
        threads = str(torch.get_num_threads())
        with self.log.open("a", encoding="utf-8") as log:
            try:
                self._process = subprocess.Popen(
                    [self.python, "-I", str(WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": threads},
                )
            except OSError as error:
                raise UserError(f"bench.vllm: '{self.python}' does not run ({error.strerror})") from error
        try:
            self.ask(self.engine, START_SECONDS)
        except WorkFailed as error:
            self.__exit__()
            raise UserError(f"bench.vllm: {error}") from error
        return self

    def __exit__(self, *raised: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # when flushing unwritten data
                pipe.close()  # type: ignore[union-attr]

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to one request. Raises WorkFailed if vLLM fails or does not answer within ``seconds``."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], seconds)
            line = process.stdout.readline() if ready else None
        except BrokenPipeError:
            line = ""
        if line is None:
            raise WorkFailed(f"vLLM of '{self.python}' did not answer within {seconds:g} s")
        try:
            answer = json.loads(line)
        except ValueError:
            raise WorkFailed(f"vLLM of '{self.python}' ended without an answer{self._last_words()}") from None
        if "error" in answer:
            raise WorkFailed(f"vLLM of '{self.python}' failed: {answer['error']}")
        return dict(answer)

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((f": {line.strip()[:300]}" for line in reversed(lines) if line.strip()), "")
