"""``lrk generate``: answers to one prompt, streamed, or to a file of prompts for many adapters in batches."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lowrank_cli import methods
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.kv_cache import growing_cache
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.errors import UserError, WorkFailed, escaped
from lowrank_cli.inference.tenants import Tenants
from lowrank_cli.methods.protocol import Adapts, Calibrates
from lowrank_cli.models.load import Loaded, load
from lowrank_cli.runs import Run, atomic_write, progress
from lowrank_cli.runs.prompt_file import Request, read_requests
from lowrank_cli.schema import GenerateConfig, GenerateRun
from lowrank_cli.session.adapter_run import check_chat, method_of, newest_run_note
from lowrank_cli.session.device import greet, prepare
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.chat import Chat, chat_of

ANSWERS = "answers.jsonl"
#: Control characters that :func:`escaped` escapes and :mod:`json` does not; as JSON escapes they stay the same text.
UNESCAPED = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Printer(TextStreamer):
    """Prints an answer while it is generated, with control characters escaped."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(escaped(text), stream_end)


def run(config: GenerateRun, run: Run, adapter_run: Path | None, *, resume: bool = False) -> dict[str, float]:
    """Write ``answers.jsonl``, and the answers to stdout or to ``generate.output``. A resumed run starts over.

    Raises:
        WorkFailed: a line of the file has no answer; all other lines are answered first.
    """
    settings = config.generate
    requests = (
        [Request({"prompt": settings.prompt})] if settings.tenants is None else read_requests(Path(settings.tenants))
    )
    output = _output(settings)
    device = prepare(config.hardware).device
    torch.manual_seed(config.seed)
    loaded = load(config.model, config.hardware, None, generates=True)
    loaded.model.to(device).eval().requires_grad_(False)
    source = newest_run_note(config, run)
    bare = adapter_run is None and not any(request.tenant for request in requests if request.error is None)
    chats = _chats(loaded, config, asked=bare)
    chat = next(iter(chats.values()), None)
    notes = [] if chat is None else [str(chat)]
    greet(run, config.hardware, loaded.model, loaded.header, packing=loaded.packing, source=source, notes=notes)
    writer = Writer(loaded, config, chat)
    began = time.monotonic()
    if settings.tenants is None:
        about = _adapt(config, loaded.model, adapter_run)
        if adapter_run is not None:
            check_chat({name: chat.hash for name, chat in chats.items()}, about, adapter_run / "adapter")
        records = [_one(writer, requests[0], streamed=output is None)]
    else:
        tenants = Tenants(loaded.model, settings.max_bytes, config.hardware.grouped)
        run.update(grouped=tenants.bank.grouped)
        records = _many(writer, requests, tenants, settings.batch_size)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    run.write_text(ANSWERS, text)
    if output is not None:
        atomic_write(output, text)
    elif settings.tenants is not None:
        sys.stdout.write(UNESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text))
    failed = [(request.line, record["error"]) for request, record in zip(requests, records) if "error" in record]
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


def _output(settings: GenerateConfig) -> Path | None:
    """``generate.output``. Raises UserError if it cannot be a file."""
    if settings.output is None:
        return None
    output = Path(settings.output)
    if not output.parent.is_dir():
        raise UserError(f"generate.output: there is no folder '{output.parent}'")
    if output.is_dir():
        raise UserError(f"generate.output: '{output}' is a folder; name a file")
    return output


def _chats(loaded: Loaded, config: GenerateRun, *, asked: bool) -> dict[str, Chat]:
    """The chat template of the task, or of each task of a mix that has one, by name."""
    tasks = config.task.parts.values() or [config.task]
    chats = {task.name: chat_of(loaded.tokenizer, task, asked=asked) for task in tasks}
    return {name: chat for name, chat in chats.items() if chat is not None}


def _adapt(config: GenerateRun, model: PreTrainedModel, adapter_run: Path | None) -> dict[str, Any]:
    """Put the adapter of ``adapter_run``, if there is one, into the model. Returns what it records about itself."""
    method = methods.create(config.method) if adapter_run is None else method_of(Run.open(adapter_run))
    if methods.can(config.method.name, Calibrates):
        raise UserError(f"method: {config.method.name} scores given answers and generates none (see lrk export)")
    if adapter_run is not None and isinstance(method, Adapts):
        adapter = method.adapt(model)
        return save_load.load(adapter, adapter_run / "adapter")
    return {}


class Writer:
    """Generates answers to prompts, in a chat template if there is one, and counts their tokens."""

    def __init__(self, loaded: Loaded, config: GenerateRun, chat: Chat | None = None):
        settings = config.generate
        self.model: PreTrainedModel = loaded.model
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer if chat is None else chat.tokenizer
        self.chat = chat
        #: largest number of tokens in a prompt; None for no limit
        self.max_prompt = None if loaded.max_positions is None else loaded.max_positions - settings.max_new_tokens
        self.tokens = 0  #: generated so far
        self.arguments: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "num_beams": settings.num_beams,
            "use_cache": True,
            "do_sample": settings.temperature > 0,
        }
        if chat is not None:
            self.model.generation_config.eos_token_id = chat.stops
        if settings.temperature > 0:
            self.arguments["temperature"] = settings.temperature
        self.streams = settings.num_beams == 1
        self.autocasts = config.hardware.precision == "autocast"

    def encoded(self, prompt: str) -> list[int]:
        """The prompt's tokens, as in training. Raises UserError for an empty prompt, or one that is too long."""
        text = prompt if self.chat is None or not prompt else self.chat.asking(prompt)
        (ids,) = encode.encode_prompts(self.tokenizer, [text], [sys.maxsize])
        if not ids:
            raise UserError("prompt: it is empty")
        if self.max_prompt is not None and len(ids) > self.max_prompt:
            new_tokens = self.arguments["max_new_tokens"]
            raise UserError(
                f"prompt: {len(ids)} tokens leave no room for generate.max_new_tokens="
                f"{new_tokens} in the model's {self.max_prompt + new_tokens}"
            )
        return ids

    def answers(self, prompts: Sequence[list[int]], streamer: TextStreamer | None = None) -> list[str]:
        """The continuation of each prompt, without special tokens."""
        inputs = encode.collate_prompts(prompts, self.tokenizer.pad_token_id)
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocasts):
            arguments = {**inputs, **self.arguments, **self._cache(), "streamer": streamer}
            generated = self.model.generate(**arguments)  # type: ignore[operator]  # not declared by PreTrainedModel
        generated = generated[:, inputs["input_ids"].shape[1] :]  # (B, T) -> (B, new)
        self.tokens += self.count_tokens(generated)
        return self.tokenizer.batch_decode(generated, skip_special_tokens=True)

    def _cache(self) -> dict[str, Any]:
        """A preallocated cache, except for beam search, which reorders and so copies its cache at every step."""
        return growing_cache(self.model, self.arguments["max_new_tokens"]) if self.streams else {}

    def count_tokens(self, generated: Tensor) -> int:
        """Number of tokens in continuations (B, new), each up to and with its first EOS."""
        config = self.model.generation_config
        ends = torch.tensor(config.eos_token_id if config.eos_token_id is not None else [], device=generated.device)
        is_end = torch.isin(generated, ends)
        ends_before = is_end.cumsum(dim=1) - is_end.long()
        # beam search fills up shorter beams with EOS or with padding
        return int(((ends_before == 0) & (generated != self.tokenizer.pad_token_id)).sum())


def _one(writer: Writer, request: Request, *, streamed: bool) -> dict[str, Any]:
    """Answer a prompt; if ``streamed``, print it token by token (with beam search, at the end)."""
    ids = writer.encoded(request.prompt)
    streamer = Printer(writer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (answer,) = writer.answers([ids], streamer if streamed and writer.streams else None)
    if streamed and not writer.streams:
        print(escaped(answer))
    return {**request.fields, "answer": answer}


def _many(writer: Writer, requests: Sequence[Request], tenants: Tenants, batch_size: int) -> list[dict[str, Any]]:
    """A record for each request: its fields with ``answer`` or ``error``. A failure does not affect other requests."""
    unloaded = tenants.load(dict.fromkeys(r.tenant for r in requests if r.error is None and r.tenant is not None))
    errors = {index: request.error for index, request in enumerate(requests) if request.error is not None}
    ids: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        try:
            if index not in errors:
                if request.tenant in unloaded:
                    raise unloaded[request.tenant]
                ids[index] = writer.encoded(request.prompt)
        except UserError as error:
            errors[index] = str(error)
    answers, failures = _in_batches(writer, tenants.bank, requests, ids, batch_size)
    errors |= failures
    return [
        {**request.fields, **({"answer": answers[index]} if index in answers else {"error": errors[index]})}
        for index, request in enumerate(requests)
    ]


def _in_batches(
    writer: Writer, bank: Bank, requests: Sequence[Request], ids: dict[int, list[int]], size: int
) -> tuple[dict[int, str], dict[int, str]]:
    """Answers and errors by request index, given the prompts' tokens. A batch that fails is repeated row by row."""
    answers: dict[int, str] = {}
    errors: dict[int, str] = {}
    order = sorted(ids, key=lambda index: len(ids[index]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    with progress.bar("answering", len(order), shown=True) as bar:
        while batches:
            rows = batches.pop(0)
            try:
                with bank.batch([requests[row].tenant for row in rows]):
                    answers |= zip(rows, writer.answers([ids[row] for row in rows]), strict=True)
                bar.advance(len(rows))
            except (UserError, RuntimeError, ValueError) as error:  # such as out of memory
                if len(rows) > 1:
                    batches = [[row] for row in rows] + batches
                else:
                    errors[rows[0]] = " ".join(str(error).split())
                    bar.advance()
    return answers, errors
