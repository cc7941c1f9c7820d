"""``lrk generate``: a prompt continued by one adapter as it is written, or a file of prompts for many at once."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lowrank_cli import methods
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.kv_cache import growing_cache
from lowrank_cli.errors import UserError, WorkFailed, escaped
from lowrank_cli.inference import progress
from lowrank_cli.inference.session import foundation, greet, method_of, prepare
from lowrank_cli.inference.tenants import Tenants
from lowrank_cli.methods.protocol import Adapts, Calibrates
from lowrank_cli.models.load import Loaded, load
from lowrank_cli.runs import Run, atomic_write
from lowrank_cli.runs.prompt_file import Request, read_requests
from lowrank_cli.schema import GenerateConfig, GenerateRun
from lowrank_cli.tasks import encode

ANSWERS = "answers.jsonl"
#: What :func:`escaped` shows and JSON leaves alone; JSON reads their escapes as the same characters.
UNSEEN = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Printer(TextStreamer):
    """Prints an answer as it is written; a terminal acts on none of its characters."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(escaped(text), stream_end)


def run(config: GenerateRun, run: Run, *, resume: bool = False) -> dict[str, float]:
    """Write ``answers.jsonl``, and the answers to stdout or to ``generate.output``. Resumed, it starts again.

    Raises WorkFailed, when all the others are answered, where a line of the file could not be.
    """
    asked = config.generate
    requests = [Request({"prompt": asked.prompt})] if asked.tenants is None else read_requests(Path(asked.tenants))
    output = None if asked.output is None else Path(asked.output)
    if output is not None and not output.parent.is_dir():
        raise UserError(f"generate.output: there is no folder '{output.parent}'")
    if output is not None and output.is_dir():
        raise UserError(f"generate.output: '{output}' is a folder; name a file")
    device = prepare(config.hardware).device
    torch.manual_seed(config.seed)
    loaded = load(config.model, config.hardware, None, generates=True)
    loaded.model.to(device).eval().requires_grad_(False)
    greet(run, config.hardware, loaded.model, loaded.header, loaded.packing)
    writer = Writer(loaded, config)
    began = time.monotonic()
    if asked.tenants is None:
        _adapt(config, loaded.model)
        records = [_one(writer, requests[0], streamed=output is None)]
    else:
        records = _many(writer, requests, asked, config.hardware.grouped)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    run.write_text(ANSWERS, text)
    if output is not None:
        atomic_write(output, text)
    elif asked.tenants is not None:
        sys.stdout.write(UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text))
    failed = [(asked.line, record["error"]) for asked, record in zip(requests, records) if "error" in record]
    if failed:
        line, why = failed[0]
        raise WorkFailed(f"{len(failed)} of {len(records)} lines have no answer; the first is line {line}: {why}")
    seconds = time.monotonic() - began
    return {
        "generate/answers": len(records),
        "generate/tokens": writer.tokens,
        "generate/seconds": seconds,
        "generate/tokens_per_second": writer.tokens / max(seconds, 1e-9),
    }


def _adapt(config: GenerateRun, model: PreTrainedModel) -> None:
    """Put the run's adapter into the model; a method without any leaves it bare."""
    below = foundation(config)
    method = methods.create(config.method) if below is None else method_of(Run.open(below))
    if methods.can(config.method.name, Calibrates):
        raise UserError(f"method: {config.method.name} scores given answers and generates none (see lrk export)")
    if below is not None and isinstance(method, Adapts):
        adapter = method.adapt(model)
        save_load.load(adapter, below / "adapter")


class Writer:
    """Continues prompts with a model, and counts the tokens."""

    def __init__(self, loaded: Loaded, config: GenerateRun):
        asked = config.generate
        self.model: PreTrainedModel = loaded.model
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.room = None if loaded.max_positions is None else loaded.max_positions - asked.max_new_tokens
        self.tokens = 0
        sampling = {"do_sample": asked.temperature > 0}
        if asked.temperature > 0:
            sampling |= {"temperature": asked.temperature}
        self.settings: dict[str, Any] = {
            "max_new_tokens": asked.max_new_tokens,
            "num_beams": asked.num_beams,
            "use_cache": True,
            **sampling,
        }
        self.streams = asked.num_beams == 1
        self.autocasts = config.hardware.precision == "autocast"

    def encoded(self, prompt: str) -> list[int]:
        """The prompt's tokens, as in training. Raises UserError where it has none, or too many for the model."""
        (ids,) = encode.encode_prompts(self.tokenizer, [prompt], [sys.maxsize])
        if not ids:
            raise UserError("prompt: it is empty")
        if self.room is not None and len(ids) > self.room:
            raise UserError(
                f"prompt: {len(ids)} tokens leave no room for generate.max_new_tokens="
                f"{self.settings['max_new_tokens']} in the model's {self.room + self.settings['max_new_tokens']}"
            )
        return ids

    def answers(self, prompts: Sequence[list[int]], streamer: TextStreamer | None = None) -> list[str]:
        """The continuation of each prompt, without special tokens."""
        inputs = encode.collate_prompts(prompts, self.tokenizer.pad_token_id)
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocasts):
            made = self.model.generate(**inputs, **self.settings, **self._cache(), streamer=streamer)
        made = made[:, inputs["input_ids"].shape[1] :]  # (B, T) -> (B, new)
        self.tokens += self._written(made)
        return self.tokenizer.batch_decode(made, skip_special_tokens=True)

    def _cache(self) -> dict[str, Any]:
        """A cache for greedy decoding and sampling; beams, which take each other's place at every step, copy anyway."""
        return growing_cache(self.model, self.settings["max_new_tokens"]) if self.streams else {}

    def _written(self, made: Tensor) -> int:
        """Tokens of continuations (B, new), each up to its first end; beams fill up with either end or padding."""
        config = self.model.generation_config
        ends = torch.tensor(config.eos_token_id if config.eos_token_id is not None else [], device=made.device)
        ended = torch.isin(made, ends).cumsum(dim=1) - torch.isin(made, ends).long()  # ends before each token
        return int(((ended == 0) & (made != self.tokenizer.pad_token_id)).sum())


def _one(writer: Writer, request: Request, *, streamed: bool) -> dict[str, Any]:
    """Answer a prompt, to stdout as it is written (beams are known at their end only)."""
    ids = writer.encoded(request.prompt)
    streamer = Printer(writer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (answer,) = writer.answers([ids], streamer if streamed and writer.streams else None)
    if streamed and not writer.streams:
        print(escaped(answer))
    return {**request.fields, "answer": answer}


def _many(writer: Writer, requests: Sequence[Request], asked: GenerateConfig, grouped: str) -> list[dict[str, Any]]:
    """One record a line: its fields with ``answer`` or ``error``. A line that fails leaves the others alone."""
    tenants = Tenants(writer.model, asked.max_bytes, grouped)
    lost = tenants.load(dict.fromkeys(r.tenant for r in requests if r.error is None and r.tenant is not None))
    errors = {at: request.error for at, request in enumerate(requests) if request.error is not None}
    ids: dict[int, list[int]] = {}
    for at, request in enumerate(requests):
        try:
            if at not in errors:
                if request.tenant in lost:
                    raise lost[request.tenant]
                ids[at] = writer.encoded(request.prompt)
        except UserError as error:
            errors[at] = str(error)

    def served(rows: Sequence[int]) -> AbstractContextManager[Any]:
        return tenants.bank.batch([requests[row].tenant for row in rows])

    found: dict[int, str] = {}
    order = sorted(ids, key=lambda at: len(ids[at]))
    batches = [order[start : start + asked.batch_size] for start in range(0, len(order), asked.batch_size)]
    with progress.bar("answering", len(order), shown=True) as bar:
        while batches:
            rows = batches.pop(0)
            try:
                with served(rows):
                    answers = writer.answers([ids[row] for row in rows])
                found |= zip(rows, answers, strict=True)
                bar.advance(len(rows))
            except (UserError, RuntimeError, ValueError) as error:  # memory, or whatever the model does not take
                if len(rows) > 1:
                    batches = [[row] for row in rows] + batches
                else:
                    errors[rows[0]] = " ".join(str(error).split())
                    bar.advance()
    return [
        {**request.fields, **({"answer": found[at]} if at in found else {"error": errors[at]})}
        for at, request in enumerate(requests)
    ]
