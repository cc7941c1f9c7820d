"""The answers to a request: from the engine's thread to a client's coroutine, and as the OpenAI API writes them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lowrank_cli.serving.engine import Engine
from lowrank_cli.serving.metrics import Metrics, Watch
from lowrank_cli.serving.requests import Failed, Listener, Model, Piece, Request
from lowrank_cli.serving.sampling import Sampling, Token


class Stream:
    """The pieces of all answers to some prompts, as they come; answers are numbered prompt by prompt.

    Creating one queues the prompts; :meth:`close` frees their rows, whatever is left.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, model: Model, prompts: Sequence[list[int]], sampling: Sampling, n: int
    ):
        self.model, self.prompt_tokens, self.answers = model, sum(map(len, prompts)), n * len(prompts)
        self.tokens = 0  #: generated so far
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Piece | Failed]] = asyncio.Queue()
        self._requests = [
            Request(model, prompt, sampling, self._listener(at * n), n) for at, prompt in enumerate(prompts)
        ]
        engine.submit(self._requests)
        self._watch = Watch(metrics, model.name, self.prompt_tokens)
        self._outcome = "gone"

    def _listener(self, first: int) -> Listener:
        def listen(news: Piece | Failed) -> None:  # in the engine's thread
            with suppress(RuntimeError):  # the loop has ended, so nobody waits
                self._loop.call_soon_threadsafe(self._news.put_nowait, (first, news))

        return listen

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Each answer's number and next piece. Raises Failed."""
        left = self.answers
        while left:
            first, news = await self._news.get()
            if isinstance(news, Failed):
                self._outcome = "failed"
                raise news
            self.tokens += len(news.tokens)
            self._watch.token(len(news.tokens))
            left -= news.finish is not None
            if not left:
                self._outcome = "done"
            yield first + news.index, news

    def close(self) -> None:
        """Cancel what is not finished. Call it exactly once."""
        for request in self._requests:
            request.cancelled = True
        self._watch.end(self._outcome, self.answers)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
        }


@dataclass
class Whole:
    """One complete answer."""

    text: str = ""
    finish: str | None = None
    pieces: list[Piece] = field(default_factory=list)


async def collected(stream: Stream) -> list[Whole]:
    """All answers, complete."""
    answers = [Whole() for _ in range(stream.answers)]
    async for number, piece in stream.pieces():
        answers[number].text += piece.text
        answers[number].finish = piece.finish
        answers[number].pieces.append(piece)
    return answers


class Format:
    """How completions are written; :class:`ChatFormat` writes chat completions."""

    kind, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, engine: Engine, model: Model, logprobs: int | None):
        self.tokenizer, self.model, self.logprobs = engine.tokenizer, model, logprobs
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A response, or a chunk of one."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
            **more,
        }

    def whole(self, stream: Stream, answers: Sequence[Whole]) -> dict[str, Any]:
        """The response with all answers."""
        choices = [self.choice(number, answer) for number, answer in enumerate(answers)]
        return self.body(self.kind, choices, usage=stream.usage)

    def choice(self, number: int, answer: Whole) -> dict[str, Any]:
        """A complete answer."""
        reported = self.reported(answer.pieces, 0)
        return {"index": number, "text": answer.text, "logprobs": reported, "finish_reason": answer.finish}

    def opening(self, answers: int) -> list[dict[str, Any]]:
        """The choices of chunks that come before any text."""
        return []

    def delta(self, number: int, piece: Piece, offset: int) -> dict[str, Any]:
        """A piece of an answer; ``offset``: characters before it."""
        reported = self.reported([piece], offset)
        return {"index": number, "text": piece.text, "logprobs": reported, "finish_reason": piece.finish}

    def reported(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any] | None:
        """Log probabilities of the tokens, if they are wanted."""
        if self.logprobs is None:
            return None
        tokens = [token for piece in pieces for token in piece.tokens]
        offsets = []
        for piece in pieces:
            offsets += [offset] * len(piece.tokens)
            offset += len(piece.text)
        return {
            "tokens": [self.text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.text(at): value for at, value in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def text(self, token: int) -> str:
        """One token as text."""
        return str(self.tokenizer.decode([token]))


class ChatFormat(Format):
    """How chat completions are written."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, number: int, answer: Whole) -> dict[str, Any]:
        return {
            "index": number,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self.reported(answer.pieces, 0),
            "finish_reason": answer.finish,
        }

    def opening(self, answers: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": at, "delta": delta, "logprobs": None, "finish_reason": None} for at in range(answers)]

    def delta(self, number: int, piece: Piece, offset: int) -> dict[str, Any]:
        return {
            "index": number,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self.reported([piece], offset),
            "finish_reason": piece.finish,
        }

    def reported(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        tokens = [token for piece in pieces for token in piece.tokens]
        return {"content": [self._token(token) for token in tokens]}

    def _token(self, token: Token) -> dict[str, Any]:
        top = [self._one(at, value) for at, value in token.top]
        return {**self._one(token.id, token.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
