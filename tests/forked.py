"""Runs of several processes without torchrun: each is forked from a server that has imported the libraries once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from unittest.mock import patch

from lowrank_cli import stages
from lowrank_cli.launch import distributed_worker, stage
from lowrank_cli.launch.nodes import Node
from lowrank_cli.launch.workers import PRELOADED
from lowrank_cli.runs import INTERRUPTED, Run
from lowrank_cli.schema import HardwareConfig


@contextmanager
def forked_workers(stop: Callable[[Run], bool] = lambda run: False) -> Iterator[None]:
    """Inside, the stages of this process fork their workers, and ask them to stop as soon as ``stop`` is true."""
    first = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port())}
    with patch.object(stage, "spawn", partial(spawn, stop=stop)), patch.dict(os.environ, first):
        yield


def unused_port() -> int:
    """A port of this machine that nobody listens to."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def spawn(
    run: Run, hardware: HardwareConfig, resume: bool, node: Node | None = None, *, stop: Callable[[Run], bool]
) -> None:
    """As :func:`lowrank_cli.launch.distributed.spawn`, with all nodes on this machine. Workers must not fail."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*stages.STAGES.values(), *PRELOADED, "lowrank_cli.tasks.metrics"])
    workers, port = [], unused_port()
    for rank in range(hardware.world):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank % hardware.processes,
            "WORLD_SIZE": hardware.world,
            "LOCAL_WORLD_SIZE": hardware.processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        arguments = [str(run.path), *(["--resume"] if resume else [])]
        workers.append(context.Process(target=_work, args=(variables, arguments)))
        workers[-1].start()
    while workers[0].is_alive() and not stop(run):
        time.sleep(0.002)
    for worker in workers:
        if worker.is_alive() and stop(run):
            os.kill(worker.pid, signal.SIGUSR1)
    for worker in workers:
        worker.join()
    run.info = Run.open(run.path).info
    if run.info["status"] == INTERRUPTED:
        raise KeyboardInterrupt
    assert [worker.exitcode for worker in workers] == [0] * hardware.world


def _work(variables: dict[str, object], arguments: list[str]) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    sys.argv = ["distributed_worker", *arguments]
    distributed_worker.main()
