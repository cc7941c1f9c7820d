"""How the next token of an answer is chosen: by settings, and with random numbers, of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The settings of one request."""

    max_tokens: int
    temperature: float = 0.0  #: 0 takes the most probable token
    top_p: float = 1.0  #: draw from the most probable tokens that together have this probability
    seed: int | None = None  #: None: different numbers every time
    stop: tuple[str, ...] = ()  #: texts that end an answer, and are not part of it
    stop_ids: frozenset[int] = frozenset()  #: tokens that end an answer
    logprobs: int | None = None  #: report each token's log probability, and those of the most probable ones

    def generators(self, count: int) -> list[torch.Generator]:
        """A generator for each of ``count`` answers."""
        first = torch.Generator()
        if self.seed is None:
            first.seed()
        else:
            first.manual_seed(self.seed)
        seeds = torch.randint(2**63 - 1, (count,), generator=first).tolist()
        return [torch.Generator().manual_seed(seed) for seed in seeds]


@dataclass(frozen=True)
class Token:
    """A generated token; log probabilities are those of the model, before temperature and ``top_p``."""

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)  #: the most probable tokens, best first


def choose(logits: Tensor, rows: Sequence[tuple[Sampling, torch.Generator]]) -> list[Token | None]:
    """The next token of each row, from logits (B, V); None where they are not numbers."""
    logits = logits.float()
    usable = logits.amax(dim=-1).isfinite().tolist()
    greedy = logits.argmax(dim=-1).tolist()
    tokens: list[Token | None] = []
    for row, (sampling, generator) in enumerate(rows):
        if not usable[row]:
            tokens.append(None)
            continue
        token = greedy[row]
        if sampling.temperature > 0:
            token = draw((logits[row] - logits[row].amax()) / sampling.temperature, sampling.top_p, generator)
        tokens.append(_reported(logits[row], token, sampling.logprobs))
    return tokens


def draw(logits: Tensor, top_p: float, generator: torch.Generator) -> int:
    """A token drawn from logits (V,).

    One uniform number picks it from the cumulative probabilities, so rounding hardly ever changes the draw.
    """
    probabilities = logits.softmax(dim=-1).double()
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    cumulative = probabilities.cumsum(dim=-1)
    number = torch.rand((), generator=generator, dtype=torch.double).to(logits.device) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, number, right=True).clamp_max(len(logits) - 1))
    return index if order is None else int(order[index])


def _reported(logits: Tensor, token: int, count: int | None) -> Token:
    """The token with its log probabilities, if they are wanted."""
    if count is None:
        return Token(token)
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return Token(token, logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))
