"""``lrk`` and its workers in processes of their own, forked from a server that has imported the libraries once.

Such a process starts in a moment, not in the four seconds that torch and transformers take to import. It has its own
session, output, environment and exit code, and may be signalled and killed. All tests of a session share the server;
what a test has put in place of the stages is there in the processes that it starts.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from reliability.command import main

from lowrank_cli import stages
from lowrank_cli.launch import distributed_worker, stage, workers
from lowrank_cli.launch.nodes import Node
from lowrank_cli.report import plots
from lowrank_cli.runs import INTERRUPTED, Run, atomic_write
from lowrank_cli.schema import HardwareConfig

TESTS = Path(__file__).parent
#: What the server starts with: a test that was the first to need it must not decide what the others get.
ENVIRONMENT = dict(os.environ)


def context() -> ForkServerContext:
    """Starts processes from the session's server, which runs from now on."""
    started = multiprocessing.get_context("forkserver")
    started.set_forkserver_preload(["preloaded"])
    path = [str(TESTS), str(TESTS.parent), *ENVIRONMENT.get("PYTHONPATH", "").split(os.pathsep)]
    with patch.dict(os.environ, ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, path))}, clear=True):
        forkserver.ensure_running()
    return started


def no_picture(figure: object, file: Path) -> None:
    """In place of :func:`lowrank_cli.report.plots.write`: rendering takes longer than many a test."""
    atomic_write(file, b"")


class Replaced:
    """Calls a function in a process of the server, where the test's environment and stages are in place.

    To pickle it, as the start of a process does, starts the server.

    Args:
        function: its dotted name.
    """

    def __init__(self, function: str):
        self.function = function

    def __getstate__(self) -> dict[str, Any]:
        context()
        here = {"environment": dict(os.environ), "stages": dict(stages.STAGES), "preloaded": workers.PRELOADED}
        return {"function": self.function, **here}

    def __call__(self, *arguments: Any) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        stages.STAGES.update(self.stages)
        workers.PRELOADED, plots.write = self.preloaded, no_picture
        pkgutil.resolve_name(self.function)(*arguments)


class Lrk:
    """``lrk ARGUMENTS``, started. A process of :class:`subprocess.Popen` whose output is kept in files.

    Args:
        directory: where it runs; by default the test's own.
    """

    def __init__(self, *arguments: str, directory: Path | None = None):
        folder = Path(tempfile.mkdtemp(prefix="lrk-"))
        self._files = [folder / "out", folder / "err"]
        call = (arguments, str(directory or Path.cwd()), [str(file) for file in self._files])
        self._process = context().Process(target=Replaced("forked.run_lrk"), args=call)
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]  # it has one once started

    def poll(self) -> int | None:
        """The exit code, minus the number of a signal that killed it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Signal the process, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process without warning, not those that it has started."""
        self.send_signal(signal.SIGKILL)

    def output(self) -> str:
        """Its stdout so far."""
        return self._read(0)

    def errors(self) -> str:
        """Its stderr so far."""
        return self._read(1)

    def _read(self, which: int) -> str:
        file = self._files[which]
        return file.read_text() if file.exists() else ""

    def wait(self, timeout: float = 120) -> int:
        """The exit code, at the end. Raises TimeoutError after ``timeout`` seconds."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            self.kill()
            raise TimeoutError(f"it has not ended after {timeout} s: {self.errors()}")
        return code


def run_lrk(arguments: Sequence[str], directory: str, files: Sequence[str]) -> None:
    """The process of :class:`Lrk`; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(directory)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), target)
        sys.argv[:] = ["lrk", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        code = main()
    finally:
        os._exit(code)


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
    processes, port = [], unused_port()
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
        processes.append(context().Process(target=_work, args=(variables, arguments)))
        processes[-1].start()
    while processes[0].is_alive() and not stop(run):
        time.sleep(0.002)
    for worker in processes:
        if worker.is_alive() and stop(run):
            os.kill(worker.pid, signal.SIGUSR1)
    for worker in processes:
        worker.join()
    run.info = Run.open(run.path).info
    if run.info["status"] == INTERRUPTED:
        raise KeyboardInterrupt
    assert [worker.exitcode for worker in processes] == [0] * hardware.world


def _work(variables: dict[str, object], arguments: list[str]) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    sys.argv = ["distributed_worker", *arguments]
    distributed_worker.main()
