"""Data-parallel runs: torch's elastic agent (what torchrun is) starts the workers and ends all when one dies."""

from __future__ import annotations

import logging
import os
import sys
import uuid

from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.runs import DONE, INTERRUPTED, Run
from lowrank_cli.runs.threads import available_cores

PATIENCE = 3600  # s that workers get after Ctrl-C to finish their step and save


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
    )
    arguments = ["-m", "lowrank_cli.dispatch.worker", str(run.path), *(["--resume"] if resume else [])]
    failure = "a worker process ended without a result"
    try:
        elastic_launch(settings, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        failure = f"worker process {rank} failed (exit code {first.exitcode}); see above"
    except SignalException:
        failure = "the worker processes were stopped"
    run.info = Run.open(run.path).info
    if run.info.get("status") == INTERRUPTED:
        raise KeyboardInterrupt
    if "error" in run.info:
        kind = UserError if run.info.get("exit_code") == UserError.exit_code else WorkFailed
        raise kind(run.info["error"])
    if run.info.get("status") != DONE:
        raise WorkFailed(failure)
