"""What the process of a single run of a sweep or study does, whoever started it: the run, on a GPU of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lowrank_cli.config.composition import Composed
from lowrank_cli.errors import Interrupted
from lowrank_cli.launch import gpu_locks, stage
from lowrank_cli.runs import Run, stopping


def do_run(folder: Path, work: Callable[[Run, Composed], None]) -> int:
    """Do the run in ``folder``. Returns this process's exit code, which only says whether a signal stopped the run."""
    try:
        with stopping.signals():
            stage.attempt(Run.open(folder), work)
    except Interrupted as error:
        return error.exit_code
    return 0


def claim_gpu(run: Run, locks: Path) -> None:
    """Restrict this process to one GPU if the run needs one; see :func:`gpu_locks.claim_gpu`."""
    hardware = run.config().get("hardware", {})
    if (hardware.get("device"), hardware.get("processes")) == ("cuda", 1):
        gpu_locks.claim_gpu(locks)
