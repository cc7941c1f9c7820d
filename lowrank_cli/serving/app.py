"""The HTTP interface: OpenAI's completions and chat completions, vLLM's loading of adapters, health and metrics."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from lowrank_cli.errors import UserError, escaped
from lowrank_cli.serving.answers import ChatFormat, Format, Stream, collected
from lowrank_cli.serving.bodies import Answering, ChatBody, CompletionBody, LoadBody, UnloadBody
from lowrank_cli.serving.chats import Template, server_template
from lowrank_cli.serving.engine import Closing, Engine, Full, UnknownModel
from lowrank_cli.serving.metrics import Metrics
from lowrank_cli.serving.middleware import Gate, error, error_body, too_large
from lowrank_cli.serving.requests import Failed, Model
from lowrank_cli.serving.sampling import Sampling

T = TypeVar("T")
RETRY = 1  #: s after which a refused client may try again


@dataclass(frozen=True)
class Options:
    """What the operator allows."""

    token: str | None = None  #: that requests have to bear
    adapters: Path | None = None  #: the folder from which adapters may be loaded; None: from nowhere
    max_body_bytes: int = 2**20
    chat_template: str | None = None  #: for models that have none of their own; None: the tokenizer's


def create(engine: Engine, options: Options, metrics: Metrics) -> FastAPI:
    """The application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # its pages of documentation need the network
    app.add_middleware(Gate, token=options.token, max_bytes=options.max_body_bytes)
    server = Server(engine, options, metrics)
    app.get("/health")(server.health)
    app.get("/metrics")(server.metrics_text)
    app.get("/v1/models")(server.list_models)
    app.get("/v1/models/{name:path}")(server.show_model)
    app.post("/v1/completions")(server.completions)
    app.post("/v1/chat/completions")(server.chat_completions)
    app.post("/v1/load_lora_adapter")(server.load_adapter)
    app.post("/v1/unload_lora_adapter")(server.unload_adapter)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, found: RequestValidationError) -> Response:
        first = found.errors()[0]
        path = [str(part) for part in first["loc"][1:]] if first["type"] != "json_invalid" else []
        where = [part for part in path if part != "str" and "[" not in part]  # without the members of unions
        reason = first.get("ctx", {}).get("error", "") if first["type"] in ("json_invalid", "value_error") else ""
        message = f"{first['msg']}: {reason}" if first["type"] == "json_invalid" else str(reason or first["msg"])
        param = ".".join(where) or None
        return error(400, escaped(f"{param}: {message}" if param else message), param=param)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, found: HTTPException) -> Response:
        return too_large(options.max_body_bytes) if found.status_code == 413 else error(found.status_code, found.detail)

    @app.exception_handler(UserError)
    async def mistaken(request: Request, found: UserError) -> Response:
        unknown = isinstance(found, UnknownModel)
        return error(404 if unknown else 400, str(found), code="model_not_found" if unknown else None)

    @app.exception_handler(TooLong)
    async def too_long(request: Request, found: TooLong) -> Response:
        return error(400, str(found), code="context_length_exceeded", param=found.param)

    @app.exception_handler(Full)
    async def full(request: Request, found: Full) -> Response:
        return error(429, f"{engine.max_waiting} answers wait already; try again later", code="queue_full", retry=RETRY)

    @app.exception_handler(Closing)
    async def closing(request: Request, found: Closing) -> Response:
        return error(503, "the server is stopping", code="stopping", retry=RETRY)

    @app.exception_handler(Failed)
    async def failed(request: Request, found: Failed) -> Response:
        return error(500, str(found))

    @app.exception_handler(Exception)
    async def broken(request: Request, found: Exception) -> Response:
        return error(500, f"the server failed ({type(found).__name__}); its log says more")

    return app


class TooLong(Exception):
    """The prompt leaves no room for an answer."""

    def __init__(self, param: str, tokens: int, new: int, limit: int):
        super().__init__(f"{param}: {tokens} tokens, and {new} for the answer, do not fit into {limit}")
        self.param = param


class Server:
    """The endpoints."""

    def __init__(self, engine: Engine, options: Options, metrics: Metrics):
        self.engine, self.options, self.metrics = engine, options, metrics
        self.template = server_template(engine.tokenizer, options.chat_template)

    async def health(self) -> Response:
        """200 as long as new requests are taken."""
        if self.engine.closing:
            raise Closing
        return JSONResponse({"status": "ok"})

    async def metrics_text(self) -> Response:
        """Prometheus' text format."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_models(self) -> dict[str, Any]:
        """The bare model and every adapter."""
        return {"object": "list", "data": [self._described(model) for model in self.engine.models]}

    async def show_model(self, name: str) -> dict[str, Any]:
        """One of them."""
        return self._described(self.engine.model(name))

    def _described(self, model: Model) -> dict[str, Any]:
        base = self.engine.base
        return {
            "id": model.name,
            "object": "model",
            "created": model.since,
            "owned_by": "lowrank_cli",
            "parent": None if model is base else base.name,
            "root": model.folder or model.name,
            "max_model_len": self.engine.max_length,
        }

    async def completions(self, http: Request, body: CompletionBody) -> Response:
        """Continue prompts as they are."""
        model = self.engine.model(body.model)
        prompts = await asyncio.to_thread(self._encoded, body.prompts)
        self._require_room("prompt", prompts, body.max_tokens)
        sampling = self._sampling(model, body, body.max_tokens, body.logprobs, frozenset())
        return await self._answer(http, body, model, prompts, sampling, Format(self.engine, model, body.logprobs))

    async def chat_completions(self, http: Request, body: ChatBody) -> Response:
        """Answer a conversation, written as the model's chat template says."""
        model = self.engine.model(body.model)
        template = self._template(model)
        messages = [message.plain for message in body.messages]
        prompt = await asyncio.to_thread(template.tokens, self.engine.tokenizer, messages)
        limit = body.max_completion_tokens or body.max_tokens
        self._require_room("messages", [prompt], limit or 1)
        logprobs = body.top_logprobs if body.logprobs else None
        most = limit or self.engine.max_length - len(prompt)
        sampling = self._sampling(model, body, most, logprobs, template.ends)
        return await self._answer(http, body, model, [prompt], sampling, ChatFormat(self.engine, model, logprobs))

    async def load_adapter(self, body: LoadBody) -> Response:
        """Load an adapter from below the folder that the operator named."""
        if self.options.adapters is None:
            return error(403, "no adapters can be loaded here; start the server with serve.adapters=FOLDER")
        allowed = self.options.adapters.resolve()
        folder = Path(os.path.realpath(allowed / body.lora_path))
        if not folder.is_relative_to(allowed):
            return error(403, "adapters can be loaded from the server's folder only", param="lora_path")
        model = await asyncio.to_thread(self.engine.load, body.lora_name, str(folder))
        note = f" ({model.note})" if model.note else ""
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully{note}.")

    async def unload_adapter(self, body: UnloadBody) -> Response:
        """Stop serving an adapter."""
        if self.options.adapters is None:
            return error(403, "no adapters can be unloaded here; start the server with serve.adapters=FOLDER")
        self.engine.unload(body.lora_name)
        self.metrics.forget(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _encoded(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        tokenizer, encoded = self.engine.tokenizer, []
        for prompt in prompts:
            ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
            if not ids:
                raise UserError("prompt: it is empty")
            if (most := max(ids)) >= len(tokenizer):
                raise UserError(f"prompt: there is no token {most} (the model has {len(tokenizer)})")
            encoded.append(ids)
        return encoded

    def _template(self, model: Model) -> Template:
        """The chat template that the model answers in."""
        template = model.template or self.template
        if template is None:
            raise UserError(
                f"messages: '{model.name}' has no chat template; use /v1/completions, or start the server with "
                "serve.chat_template=FILE"
            )
        return template

    def _require_room(self, param: str, prompts: Sequence[list[int]], new: int) -> None:
        for prompt in prompts:
            if len(prompt) + new > self.engine.max_length:
                raise TooLong(param, len(prompt), new, self.engine.max_length)

    def _sampling(
        self, model: Model, body: Answering, limit: int, logprobs: int | None, ends: frozenset[int]
    ) -> Sampling:
        if model.calibrated and logprobs is not None:
            raise UserError(f"logprobs: '{model.name}' scores whole answers; their tokens have no log probabilities")
        if body.n > self.engine.max_rows:
            raise UserError(f"n: {body.n} is out of range (allowed: 1 to {self.engine.max_rows})")
        eos = self.engine.tokenizer.eos_token_id
        assert isinstance(eos, int)
        stops = frozenset[int]() if body.ignore_eos else ends | {eos}
        return Sampling(limit, body.temperature, body.top_p, body.seed, body.stops, stops, logprobs)

    async def _answer(
        self,
        http: Request,
        body: Answering,
        model: Model,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        form: Format,
    ) -> Response:
        """Queue the prompts; their answers as one response, or as a stream of chunks."""
        if len(prompts) * body.n > self.engine.max_waiting:
            most = self.engine.max_waiting
            raise UserError(f"prompt: {len(prompts) * body.n} answers at once are too many (allowed: 1 to {most})")
        try:
            stream = Stream(self.engine, self.metrics, model, prompts, sampling, body.n)
        except Full:
            self.metrics.requests.labels(model.name, "refused").inc()
            raise
        if body.stream:
            return Streaming(stream, _chunks(stream, form, body.usage_in_stream))
        try:
            answers = await _unless_gone(http, collected(stream))
        finally:
            stream.close()
        return Response(status_code=499) if answers is None else JSONResponse(form.whole(stream, answers))


class Streaming(StreamingResponse):
    """Server-sent events of a stream, which is closed when they end or the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, chunks: AsyncIterator[str]):
        super().__init__(chunks)
        self.stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.stream.close()


async def _chunks(stream: Stream, form: Format, usage: bool) -> AsyncIterator[str]:
    """The server-sent events."""
    offsets = [0] * stream.answers
    try:
        for choice in form.opening(stream.answers):
            yield _event(form.body(form.chunk, [choice]))
        async for number, piece in stream.pieces():
            if piece.text or piece.finish or form.logprobs is not None:
                yield _event(form.body(form.chunk, [form.delta(number, piece, offsets[number])]))
            offsets[number] += len(piece.text)
        if usage:
            yield _event(form.body(form.chunk, [], usage=stream.usage))
        yield "data: [DONE]\n\n"
    except Failed as failed:
        yield _event(error_body(str(failed), "server_error"))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _unless_gone(http: Request, work: Awaitable[T]) -> T | None:
    """The result of ``work``; None, and no more work, once the client has gone away."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
            with suppress(asyncio.CancelledError, Failed):
                await task
