"""Data-parallel runs: torch's elastic agent (as in torchrun) starts the workers, and stops all when one dies."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from typing import TYPE_CHECKING

from lowrank_cli.errors import UserError, WorkFailed, escaped
from lowrank_cli.launch.nodes import WAIT, Node
from lowrank_cli.runs import FAILED, INTERRUPTED, Run, stopping
from lowrank_cli.runs.threads import available_cores
from lowrank_cli.schema import HardwareConfig

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SHUTDOWN_TIMEOUT = 3600  # seconds for workers to finish their step and save after a signal


def spawn(run: Run, hardware: HardwareConfig, resume: bool, node: Node | None = None) -> None:
    """Run the stage of a prepared run folder in worker processes, and update ``run.info``.

    Args:
        hardware: says how many workers there are.
        resume: whether the run goes on from its checkpoint.
        node: this machine, if there are several.

    Raises:
        KeyboardInterrupt: a signal stopped the run.
        UserError, WorkFailed: the first failure of a worker.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are reported once, below
    threads = max(1, available_cores().count // hardware.processes)  # they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    settings = LaunchConfig(
        min_nodes=hardware.nodes,
        max_nodes=hardware.nodes,
        nproc_per_node=hardware.processes,
        run_id=run.path.name if node else uuid.uuid4().hex,
        rdzv_backend="static" if node else "c10d",
        rdzv_endpoint=f"{node.host}:{node.port}" if node else "localhost:0",
        rdzv_configs={"rank": node.rank, "timeout": WAIT} if node else {},
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_TIMEOUT,
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are handled here
    )
    arguments = ["-m", "lowrank_cli.launch.distributed_worker", str(run.path), *(["--resume"] if resume else [])]

    def forward_stop() -> None:
        raise SignalException("stop", signal.SIGUSR1)  # the agent sends it to the workers and waits for them

    failures: dict[int, ProcessFailure] = {}
    try:
        with stopping.on_stop(forward_stop):
            elastic_launch(settings, sys.executable)(*arguments)
    except ChildFailedError as error:
        failures = error.failures
    except SignalException:
        pass
    run.info = Run.open(run.path).info
    if stopping.requested():
        raise KeyboardInterrupt
    _raise_first(run, failures)
    if run.info.get("status") == INTERRUPTED:
        raise KeyboardInterrupt
    if not run.completed and not (node and node.rank):  # a shared disk may show it late
        raise WorkFailed("the worker processes ended without a result")


def _raise_first(run: Run, failures: dict[int, ProcessFailure]) -> None:
    """Raise the first failure; when one worker dies, the others fail too or the agent stops them."""
    failures = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM}
    if killed := {rank: failure for rank, failure in failures.items() if failure.exitcode < 0}:
        rank, failure = min(killed.items())
        (run.path / "error.txt").unlink(missing_ok=True)  # another worker's: it lost the connection to this one
        raise WorkFailed(f"worker process {rank} (pid {failure.pid}) was killed ({failure.signal_name()})")
    failed = {rank: failure for rank, failure in failures.items() if failure.exitcode < 128}
    if not failed:
        return
    rank, failure = min(failed.items(), key=lambda item: (item[1].timestamp, item[0]))
    recorded = run.info if run.info.get("status") == FAILED else {}
    if (message := failure.error_file_data["message"]) and isinstance(message, dict):  # a bug
        sys.stderr.write(escaped(message["extraInfo"]["py_callstack"]))
        raise WorkFailed(recorded["error"] if rank == 0 else f"worker process {rank}: {message['message']}")
    kind = UserError if failure.exitcode == UserError.exit_code else WorkFailed
    raise kind(recorded.get("error", f"worker process {rank} failed (exit code {failure.exitcode})"))
