"""Runs the application on a socket until a signal stops it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from lowrank_cli.errors import UserError
from lowrank_cli.runs import stopping
from lowrank_cli.serving.engine import Engine

BACKLOG = 1024  #: connections that may wait until the server takes them


def listen(host: str, port: int) -> socket.socket:
    """A socket whose connections wait until the server runs. Raises UserError if it cannot have the port."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as problem:
        reason = str(problem.strerror).partition(" (")[0]  # without the address once more
        raise UserError(f"serve.port: {host}:{port} cannot be used: {reason}") from None


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Quiet(uvicorn.Server):
    """Leaves signals to :mod:`lowrank_cli.runs.stopping`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(app: FastAPI, engine: Engine, listener: socket.socket, grace: float) -> None:
    """Serve until a signal comes; then finish what runs, within ``grace`` seconds."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    server = _Quiet(config)
    with stopping.on_stop(stopper(server, engine)):
        server.run(sockets=[listener])


def stopper(server: uvicorn.Server, engine: Engine) -> Callable[[], None]:
    """What stops the server: new requests are refused, and running ones go on."""

    def stop() -> None:
        engine.refuse()
        server.should_exit = True

    return stop
