"""An OpenAI server in a process of its own: ours, or vLLM's."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from lowrank_cli.bench.http_load import HOST
from lowrank_cli.errors import WorkFailed

START_SECONDS = 900  #: for importing libraries, loading the model and its adapters
STOP_SECONDS = 20


class ServerProcess:
    """A server that answers on :attr:`port` inside a ``with``.

    Args:
        command: starts it; ``{port}`` stands for its port.
        environment: variables besides those of this process; empty ones are removed.
        log: receives what it prints.

    Raises:
        WorkFailed: it ends, or is not ready in time.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self.command, self.environment, self.log = command, environment, log
        with socket.create_server((HOST, 0)) as free:
            self.port: int = free.getsockname()[1]

    def __enter__(self) -> ServerProcess:
        command = [word.replace("{port}", str(self.port)) for word in self.command]
        environment = {key: value for key, value in {**os.environ, **self.environment}.items() if value}
        with self.log.open("a", encoding="utf-8") as log:
            try:
                self._process = subprocess.Popen(
                    command, stdout=log, stderr=log, env=environment, start_new_session=True
                )
            except OSError as error:
                raise WorkFailed(f"'{command[0]}' does not run ({error.strerror})") from error
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):  # what it started, too
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def cpu_seconds(self) -> float:
        """Processor time so far of the server and what it started; 0 where there is no ``/proc``."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # ended
                fields = path.read_text().rpartition(")")[2].split()  # state, parent, group, session, …
                if int(fields[3]) == self._process.pid:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise WorkFailed(f"the server ended{self._last_words()}")
            connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
            with closing(connection), suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.2)
        raise WorkFailed(f"the server was not ready within {START_SECONDS} s{self._last_words()}")

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((f": {line.strip()[:300]}" for line in reversed(lines) if line.strip()), "")
