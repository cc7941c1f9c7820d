"""vLLM in ``lrk bench decode``: the same weights and prompts, and our LoRAs as ``lrk export`` writes them.

It runs in processes of its own, by the Python that ``bench.vllm`` names, one for each entry: an engine that can take
adapters computes the bare model differently from one that cannot.
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
from lowrank_cli.bench.decode_rows import Sample
from lowrank_cli.bench.shared_weights import Twin, perturb, single_twin
from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.models.load import quiet
from lowrank_cli.schema import BenchRun, DecodeBench

WORKER = Path(__file__).with_name("vllm_worker.py")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  #: ``max_lora_rank`` that vLLM 0.32 takes
START_SECONDS = 600  #: for importing vLLM and loading the model
ANSWER_SECONDS = 1800  #: for a batch
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the worker's own process, which takes the time
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass
class Served(Twin):
    """The base model, or it with LoRAs, in a process of vLLM's."""

    worker: Worker | None = None
    folders: tuple[str | None, ...] = (None,)  #: of adapters, which take turns over the rows

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
) -> Iterator[dict[int | None, dict[str, Twin]]]:
    """For each number of adapters in ``counts`` (None: one, alone) what vLLM runs of ``variants``, by entry.

    vLLM's own messages go to ``log``.

    Raises UserError where ``bench.vllm`` is no Python with vLLM, and where vLLM does not take the model.
    """
    assert isinstance(config.bench, DecodeBench)
    found: dict[int | None, dict[str, Twin]] = {count: {} for count in counts}
    if not variants:
        yield found
        return
    with ExitStack() as undo:
        folder = Path(undo.enter_context(TemporaryDirectory(prefix="lrk-vllm-")))
        with quiet(True):
            base.save_pretrained(folder / "model")
        for entry, variant in variants.items():
            most = max(count or 1 for count in counts)
            paths, twin = ([], None) if variant is None else _exported(base, entry, variant, most, config.seed, folder)
            worker = undo.enter_context(
                Worker(str(config.bench.vllm), engine_settings(folder / "model", config, variant, most), log)
            )
            for count in counts:
                if twin is None:
                    found[count][entry] = Served(None, worker=worker, apart=True)
                    continue
                found[count][entry] = Served(
                    None,
                    parameters=twin.parameters,
                    own_bytes=twin.own_bytes * (count or 1),
                    modules=twin.modules,
                    adapters=count or 1,
                    apart=True,
                    worker=worker,
                    folders=tuple(paths[: count or 1]),
                )
        yield found


def _exported(
    base: PreTrainedModel, entry: str, variant: Any, count: int, seed: int, folder: Path
) -> tuple[list[str], Twin]:
    """Folders of ``count`` different LoRAs, and the twin that they were made with."""
    twin, paths = single_twin(base, entry, variant, seed), []
    assert twin.adapter is not None
    for number in range(count):
        perturb(twin.adapter)
        path = folder / f"{entry.replace(' ', '-')}-{number}"
        path.mkdir()
        save_lora(twin.adapter, as_lora(twin.adapter, None)[0], path)
        paths.append(str(path))
    return paths, twin


def engine_settings(model: Path, config: BenchRun, variant: Any, adapters: int) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM``: it has room for the batch, and for its prompts in one pass."""
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
        raise UserError(f"bench.rank: {variant.rank} is above what vLLM takes (allowed: up to {RANKS[-1]})")
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
            with suppress(BrokenPipeError):  # what was not written yet
                pipe.close()  # type: ignore[union-attr]

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to one request. Raises WorkFailed where there is none in time, or vLLM failed."""
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
