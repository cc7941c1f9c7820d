"""A client that sends requests to an OpenAI server at given times, and when their tokens came back."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lowrank_cli.errors import WorkFailed
from lowrank_cli.reader import parse_json

HOST = "127.0.0.1"
SECONDS = 1800  #: until a request has failed


@dataclass(frozen=True)
class Trace:
    """One answered request; times in s since the first request was due."""

    sent: float
    first: float  #: when its first token came
    last: float
    tokens: int

    @property
    def seconds_per_token(self) -> float:
        """Mean time of the tokens after the first."""
        return (self.last - self.first) / max(1, self.tokens - 1)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """When ``count`` requests are sent, in s: a Poisson process of ``rate`` requests per s, all at once if infinite."""
    draw, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(at)
        at += draw.expovariate(rate) if rate != float("inf") else 0.0
    return times


def send(port: int, bodies: Sequence[dict[str, Any]], times: Sequence[float]) -> list[Trace]:
    """Send each body to ``/v1/completions`` at its time, as a stream. Raises WorkFailed unless all are answered."""

    async def all_of_them() -> list[Trace]:
        began = time.perf_counter() + 0.01
        work = [_answered(port, body, began, at) for body, at in zip(bodies, times, strict=True)]
        return await asyncio.wait_for(asyncio.gather(*work), SECONDS)

    try:
        return asyncio.run(all_of_them())
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise WorkFailed(f"the server did not answer: {error or type(error).__name__}") from error


async def _answered(port: int, body: dict[str, Any], began: float, at: float) -> Trace:
    await asyncio.sleep(began + at - time.perf_counter())
    sent = time.perf_counter() - began
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        status = (await reader.readline()).decode().strip()
        if " 200 " not in status:
            raise WorkFailed(f"the server refused a request: {status}: {(await reader.read(2000)).decode()[-500:]}")
        first = last = 0.0
        tokens = 0
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            event = parse_json(line.removeprefix(b"data: "), dict[str, Any], "the server's answer")
            if "error" in event:
                raise WorkFailed(f"the server failed: {event['error'].get('message')}")
            if event["choices"]:
                last = time.perf_counter() - began
                first = first or last
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    finally:
        writer.close()
        with suppress(OSError):  # the server may close first
            await writer.wait_closed()
    if not tokens:
        raise WorkFailed("the server ended an answer early")
    return Trace(sent, first, last, tokens)
