"""A request to the engine, and the answers that it gets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from lowrank_cli.adapter.tenants.batch import PromptGates
from lowrank_cli.serving.chats import Template
from lowrank_cli.serving.sampling import Sampling, Token
from lowrank_cli.serving.text import Text

STOP, LENGTH = "stop", "length"  #: why an answer ended


@dataclass(frozen=True)
class Piece:
    """News of one answer: tokens and the text that they complete, if any."""

    index: int  #: of the answer in its request
    text: str
    tokens: list[Token]
    finish: str | None = None  #: why the answer ends here


class Failed(Exception):
    """The request cannot be answered; the message is for the client."""


#: Called in the engine's thread with each piece, or once with why there are no more. It must not block.
Listener = Callable[[Piece | Failed], None]


@dataclass(frozen=True, eq=False)
class Model:
    """What requests can ask for: the model without an adapter, or with one."""

    name: str
    adapter: str | None = None  #: its name in the bank, if it is there
    folder: str | None = None  #: of the adapter or its run, as it was given
    calibrated: bool = False  #: whether it gives one of a few answers, which have no log probabilities
    template: Template | None = None  #: the chat template that it was trained in, if it is known
    note: str = ""  #: what the operator should know about it
    since: int = field(default_factory=lambda: int(time.time()))  #: when it was loaded, in s since 1970


@dataclass(eq=False)
class Request:
    """A prompt, and how it is to be answered ``count`` times."""

    model: Model
    prompt: list[int]
    sampling: Sampling
    listener: Listener
    count: int = 1
    cancelled: bool = False  #: set by anyone; its rows leave before the next step

    def answers(self, tokenizer: PreTrainedTokenizerBase, gates: PromptGates) -> list[Answer]:
        """The answers, without tokens."""
        generators = self.sampling.generators(self.count)
        return [Answer(self, index, tokenizer, gates, generator) for index, generator in enumerate(generators)]

    def fail(self, error: Failed) -> None:
        """Tell the listener, once, that there is nothing more."""
        if not self.cancelled:
            self.cancelled = True
            self.listener(error)


class Answer:
    """One answer of a request while it is generated: a row of a batch.

    Args:
        index: of the answer in its request.
        gates: of the prompt's routed modules.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        tokenizer: PreTrainedTokenizerBase,
        gates: PromptGates,
        generator: torch.Generator,
    ):
        self.request, self.index, self.gates, self.generator = request, index, gates, generator
        self.text = Text(tokenizer, request.sampling.stop)
        self.last = -1  #: the newest token
        self.count = 0  #: tokens so far
        self.finished = False

    @property
    def done(self) -> bool:
        """Whether the row can leave."""
        return self.finished or self.request.cancelled

    def add(self, token: Token | None) -> None:
        """Append a token and tell the listener; None for logits that are not numbers fails the request."""
        if self.request.cancelled:
            return
        if token is None:
            self.request.fail(Failed("the model's output is not a number"))
            return
        sampling = self.request.sampling
        self.last, self.count = token.id, self.count + 1
        ended = token.id in sampling.stop_ids
        text = "" if ended else self.text.add(token.id)
        finish = STOP if ended or self.text.stopped else LENGTH if self.count == sampling.max_tokens else None
        if finish and not self.text.stopped:
            text += self.text.rest()
            finish = STOP if self.text.stopped else finish
        self.finished = finish is not None
        self.request.listener(Piece(self.index, text, [token], finish))
