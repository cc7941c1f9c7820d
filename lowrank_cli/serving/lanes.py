"""Models with the answers that they are generating: rows of one batch, which join and leave at every step.

All adapters that a bank holds share a lane. An adapter that is more than low-rank products has a lane of its own, and
so have calibrated answers; their models are copies that share the weights. One thread uses all lanes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_cli.adapter.kv_cache import pass_cache, returned_cache
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.adapter.tenants.batch import PromptGates, Workspace
from lowrank_cli.calibration.logits_processor import AnswerProcessor
from lowrank_cli.serving.kv_rows import KVRows
from lowrank_cli.serving.requests import STOP, Answer, Failed, Piece, Request
from lowrank_cli.serving.sampling import Token, choose
from lowrank_cli.tasks.encode import collate_prompts


@dataclass(frozen=True)
class Read:
    """Prompts after their pass: the KV cache, the logits of the first token (B, V), and the gates."""

    cache: DynamicCache
    logits: Tensor
    gates: list[PromptGates]


class Lane:
    """One model and its running answers."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: bool):
        self.model, self.tokenizer, self.autocast = model, tokenizer, autocast
        self.answers: list[Answer] = []
        self.rows = KVRows()
        accepted = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in accepted
        self._options = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in accepted else {})}

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether the answers of ``requests`` can join the running ones."""
        return True

    @torch.no_grad()
    def read(self, requests: Sequence[Request]) -> Any:
        """Read the prompts; returns what :meth:`join` takes. A failure leaves the running answers as they are."""
        inputs = self._collated(requests)
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)  # (B, T)
        cache = DynamicCache()  # without the model's config: all layers keep all tokens
        with self._prompts(requests) as gates:
            logits = self.forward(inputs, cache)  # (B, V)
            return Read(cache, logits, gates())

    @torch.no_grad()
    def join(self, requests: Sequence[Request], read: Any) -> None:
        """Generate the first token of each answer to ``requests``, whose prompts are ``read``."""
        sources, answers = [], []
        for row, (request, gates) in enumerate(zip(requests, read.gates, strict=True)):
            sources += [row] * request.count
            answers += request.answers(self.tokenizer, gates)
        self.rows.join(read.cache, sources, [len(answer.request.prompt) for answer in answers])
        self.answers += answers
        self._extend(answers, read.logits[torch.tensor(sources, device=read.logits.device)])
        self._leave()

    @torch.no_grad()
    def step(self) -> None:
        """Generate one more token of each answer; those that are finished or cancelled leave."""
        self._leave()  # those cancelled since
        if self.answers:
            with self._continued():
                inputs = self.rows.inputs([answer.last for answer in self.answers], self.model.device)
                logits = self.forward(inputs, self.rows.cache)  # (B, V)
            self._extend(self.answers, logits)
            self._leave()

    def fail(self, error: Failed) -> None:
        """End all answers, and forget whatever state a failed step has left."""
        for answer in self.answers:
            answer.request.fail(error)
        self.suspend()
        self.answers, self.rows = [], KVRows()

    def suspend(self) -> None:
        """Leave the model as it is outside of batches; the next step resumes."""

    def _leave(self) -> None:
        rows = [at for at, answer in enumerate(self.answers) if not answer.done]
        if len(rows) < len(self.answers):
            self.suspend()
            self.answers = [self.answers[at] for at in self.rows.keep(rows)]

    def _extend(self, answers: Sequence[Answer], logits: Tensor) -> None:
        """Append a token, chosen from logits (B, V), to each answer."""
        rows = [(answer.request.sampling, answer.generator) for answer in answers]
        for answer, token in zip(answers, choose(logits, rows), strict=True):
            answer.add(token)

    def _collated(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        """Prompts as ids and mask (B, T), padded on the left."""
        assert isinstance(self.tokenizer.pad_token_id, int)
        batch = collate_prompts([request.prompt for request in requests], self.tokenizer.pad_token_id)
        return {key: value.to(self.model.device) for key, value in batch.items()}

    def forward(self, inputs: dict[str, Tensor], cache: DynamicCache) -> Tensor:
        """Logits of the last position, (B, V)."""
        if not self._positions:
            inputs = {key: value for key, value in inputs.items() if key != "position_ids"}
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(**inputs, **pass_cache(self.model, cache), **self._options)
        assert returned_cache(output) is cache
        logits: Tensor = output.logits[:, -1]  # (B, T, V) -> (B, V)
        return logits

    @contextmanager
    def _prompts(self, requests: Sequence[Request]) -> Iterator[Callable[[], list[PromptGates]]]:
        """Inside, a pass reads the prompts of ``requests``; yields a function that then returns their gates."""
        yield lambda: [{} for _ in requests]

    @contextmanager
    def _continued(self) -> Iterator[None]:
        """Inside, a pass continues the running answers."""
        yield


class BankLane(Lane):
    """The bare model, and the adapters of a bank. The bank's batch stays open as long as its rows stay the same."""

    def __init__(self, bank: Bank, tokenizer: PreTrainedTokenizerBase, autocast: bool):
        super().__init__(bank.model, tokenizer, autocast)
        self.bank = bank
        self._batch: ExitStack | None = None
        # What batches leave for the next one; nothing where memory is bounded.
        self._running = Workspace() if bank.max_bytes is None else None
        self._joining = Workspace() if bank.max_bytes is None else None

    def fits(self, requests: Sequence[Request]) -> bool:
        joining = [request.model.adapter for request in requests for _ in range(request.count)]
        return self.bank.fits([*(answer.request.model.adapter for answer in self.answers), *joining])

    def suspend(self) -> None:
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    @contextmanager
    def _prompts(self, requests: Sequence[Request]) -> Iterator[Callable[[], list[PromptGates]]]:
        self.suspend()
        workspace = self._joining if self.answers else self._running
        with self.bank.batch([request.model.adapter for request in requests], workspace=workspace) as batch:
            yield batch.gates

    @contextmanager
    def _continued(self) -> Iterator[None]:
        if self._batch is None:
            adapters = [answer.request.model.adapter for answer in self.answers]
            gates = [answer.gates for answer in self.answers]
            with ExitStack() as stack:
                stack.enter_context(self.bank.batch(adapters, gates, self._running))
                self._batch = stack.pop_all()
        yield


class CalibratedLane(Lane):
    """A model whose answers are one of a few, scored by a calibration. Each is generated in one call."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: bool, processor: AnswerProcessor
    ):
        super().__init__(model, tokenizer, autocast)
        self.processor = processor
        self._longest = 1 + max(map(len, processor.following))  # tokens of an answer, with EOS

    @torch.no_grad()
    def read(self, requests: Sequence[Request]) -> Any:
        """The tokens of each prompt's answer."""
        inputs, eos = self._collated(requests), self.processor.eos
        self.processor.reset()
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            generated = self.model.generate(  # type: ignore[operator]  # not declared by PreTrainedModel
                **inputs,
                logits_processor=[self.processor],
                num_beams=self.processor.beams,
                length_penalty=0.0,
                max_new_tokens=self._longest,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        rows = [[*row, eos] for row in generated[:, inputs["input_ids"].shape[1] :].tolist()]
        return [row[: row.index(eos)] for row in rows]

    def join(self, requests: Sequence[Request], read: Any) -> None:
        """Tell the listeners; nothing goes on running."""
        for request, ids in zip(requests, read, strict=True):
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            for index in range(request.count):
                request.listener(Piece(index, text, [Token(token) for token in ids], STOP))
