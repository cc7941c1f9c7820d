"""Log probabilities of texts that continue others, and texts generated until a stop string.

What a continuation follows is its prompt: the only text that prompt-aware routing reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from lowrank_cli.adapter.kv_cache import growing_cache
from lowrank_cli.inference.choice_scores import Tick, candidate_scores
from lowrank_cli.session.session import Session
from lowrank_cli.tasks import encode

Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]  #: the tokens of a prompt and of what follows it
LONGEST = 2048  #: tokens, for a model that does not say


def longest(session: Session) -> int:
    """Tokens that the model has positions for."""
    return int(getattr(session.model.config.get_text_config(), "max_position_embeddings", LONGEST))


def pair(session: Session, prompt: str, continuation: str, limit: int) -> Pair:
    """Tokens of both, encoded together, so that a token at the border is the continuation's.

    White space at the end of the prompt becomes the continuation's. A prompt without tokens becomes BOS, or EOS where
    the tokenizer has no BOS. What is longer than ``limit`` loses its beginning.
    """
    tokenizer = session.prompt_tokenizer
    stripped = prompt.rstrip()
    continuation = prompt[len(stripped) :] + continuation
    front = encode.bos(tokenizer)
    before = front + tokenizer(stripped, add_special_tokens=False)["input_ids"]
    both = front + tokenizer(stripped + continuation, add_special_tokens=False)["input_ids"]
    if not stripped:
        start = start_token(session)
        before, both = [start], [start, *both[len(front) :]]
    after = both[len(before) :] or tokenizer(continuation, add_special_tokens=False)["input_ids"]
    after = after[-limit:]
    return tuple(before[-max(1, limit + 1 - len(after)) :]), tuple(after)


def start_token(session: Session) -> int:
    """What a text without a prompt follows: BOS, or EOS where the tokenizer has no BOS."""
    tokenizer = session.prompt_tokenizer
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert isinstance(token, int)
    return token


def windows(tokens: Sequence[int], start: int, limit: int) -> Iterator[Pair]:
    """A text of any length in pieces of ``limit`` tokens, each once; the last one follows as many tokens as fit."""
    for at in range(0, len(tokens), limit):
        piece = tokens[at : at + limit]
        first = max(0, at + len(piece) - limit)  # of the tokens that the model reads
        yield tuple(tokens[first - 1 : at]) if first else (start, *tokens[:at]), tuple(piece)


def log_probability_and_gap(logits: Tensor, tokens: Tensor) -> Tensor:
    """Two scores (2, B, C) of tokens (B, C) after logits (B, V): log probability, and logit minus the largest one.

    The second is 0 for the token that greedy decoding would choose.
    """
    chosen = logits.gather(-1, tokens)  # (B, C)
    return torch.stack([chosen - logits.logsumexp(-1, keepdim=True), chosen - logits.amax(-1, keepdim=True)])


@torch.no_grad()
def log_likelihoods(
    session: Session, pairs: Sequence[Pair], tick: Tick = lambda count: None
) -> list[tuple[float, bool]]:
    """For each pair the log probability of its continuation, and whether greedy decoding would choose it.

    Each prompt runs once for all its continuations. Batches hold prompts of similar lengths.

    Args:
        tick: called with the number of different pairs done since the last call.
    """
    session.model.eval()
    by_prompt: dict[Tokens, list[Tokens]] = {}
    for prompt, continuation in dict.fromkeys(pairs):
        by_prompt.setdefault(prompt, []).append(continuation)
    order = sorted(by_prompt, key=lambda prompt: (len(prompt), max(map(len, by_prompt[prompt]))))
    scores: dict[Pair, tuple[float, bool]] = {}
    with session.autocast():
        for start in range(0, len(order), session.batch_size):
            prompts = order[start : start + session.batch_size]
            inputs: Any = _inputs(session, prompts)
            options = [[list(continuation) for continuation in by_prompt[prompt]] for prompt in prompts]
            rows: Any = candidate_scores(session.model, **inputs, options=options, rule=log_probability_and_gap)
            for prompt, (sums, gaps) in zip(prompts, rows, strict=True):
                for continuation, total, gap in zip(by_prompt[prompt], sums, gaps, strict=True):
                    scores[prompt, continuation] = total, gap == 0
            tick(sum(map(len, options)))
    return [scores[one] for one in pairs]


class _Stops(StoppingCriteria):
    """Ends a row as soon as its new text holds one of ``until``."""

    def __init__(self, session: Session, past: int, until: Sequence[str]):
        self.tokenizer, self.past, self.until = session.prompt_tokenizer, past, until

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.past :])
        ended = [any(stop in text for stop in self.until) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


@torch.no_grad()
def generate_until(
    session: Session,
    prompts: Sequence[str],
    until: Sequence[str],
    new_tokens: int,
    limit: int,
    tick: Tick = lambda count: None,
    **settings: Any,
) -> list[str]:
    """Texts that continue ``prompts``, each up to the first of ``until`` in it, or EOS, or ``new_tokens``.

    Args:
        limit: longest prompt with its answer, in tokens; a longer prompt loses its beginning.
        tick: called with the number of prompts done since the last call.
        settings: of transformers' ``generate``, such as ``do_sample``.
    """
    session.model.eval()
    tokenizer, size = session.prompt_tokenizer, session.batch_size
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    with session.autocast():
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            room = max(1, limit - new_tokens)
            rows = encode.encode_prompts(tokenizer, [prompts[i] for i in batch], [room] * len(batch))
            inputs = _inputs(session, [row or [start_token(session)] for row in rows])
            past = inputs["input_ids"].shape[1]
            out = session.model.generate(  # type: ignore[operator]  # not declared by PreTrainedModel
                **inputs,
                **growing_cache(session.model, new_tokens),
                max_new_tokens=new_tokens,
                stopping_criteria=StoppingCriteriaList([_Stops(session, past, until)] if until else []),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=session.stops(),
                **({"do_sample": False} | settings),
            )
            for index, text in zip(batch, tokenizer.batch_decode(out[:, past:], skip_special_tokens=True), strict=True):
                texts[index] = min((text.partition(stop)[0] for stop in until), key=len, default=text)
            tick(len(batch))
    return texts


def _inputs(session: Session, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    inputs = encode.collate_prompts(prompts, session.tokenizer.pad_token_id)
    return {key: value.to(session.device) for key, value in inputs.items()}
