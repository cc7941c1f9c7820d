"""Data-parallel runs: torch's elastic agent (what torchrun is) starts the workers and ends all when one dies."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from typing import TYPE_CHECKING

from lowrank_cli.errors import UserError, WorkFailed, escaped
from lowrank_cli.runs import FAILED, INTERRUPTED, Run, stopping
from lowrank_cli.runs.threads import available_cores

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

PATIENCE = 3600  # s that workers get after a signal to finish their step and save


def spawn(run: Run, processes: int, resume: bool) -> None:
    """Run the stage of a prepared folder in ``processes`` workers, and raise here what ended it badly."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # how the run ended is said once, below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores().count // processes)))  # they share the cores
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=PATIENCE,
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are handled here
    )
    arguments = ["-m", "lowrank_cli.launch.distributed_worker", str(run.path), *(["--resume"] if resume else [])]

    def hand_on() -> None:
        raise SignalException("stop", signal.SIGUSR1)  # which the agent sends to the workers, and then waits for them

    failures: dict[int, ProcessFailure] = {}
    try:
        with stopping.on_stop(hand_on):
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
    if not run.completed:
        raise WorkFailed("the worker processes ended without a result")


def _raise_first(run: Run, failures: dict[int, ProcessFailure]) -> None:
    """Raise what went wrong first; the death of one worker makes the others fail, or the agent stop them."""
    failures = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM}
    if killed := {rank: failure for rank, failure in failures.items() if failure.exitcode < 0}:
        rank, failure = min(killed.items())
        (run.path / "error.txt").unlink(missing_ok=True)  # how another worker lost the connection to this one
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
