"""One process of a data-parallel run: ``torchrun -m lowrank_cli.launch.distributed_worker RUN_FOLDER [--resume]``."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time

from lowrank_cli.config.composition import restore
from lowrank_cli.errors import Interrupted, LrkError
from lowrank_cli.launch.stage import perform, recorded
from lowrank_cli.runs import Run, stopping

GRACE = 3  # s that the recording process gets to write down how the work failed


def main() -> None:
    """Only the first process writes into the folder; the parent process reads there how the work ended."""
    stopping.with_parent(lambda: os._exit(1))  # killed, or a second signal ended it: nobody else may write meanwhile
    folder, *flags = sys.argv[1:]
    run = Run.open(folder, writes=os.environ["RANK"] == "0")
    try:
        with stopping.signals(), recorded(run):
            perform(run, restore(run), "--resume" in flags)
    except BaseException as error:
        handed_on = isinstance(error, Interrupted) and error.exit_code == 128 + signal.SIGUSR1  # the parent waits
        if not (run.writes or handed_on):  # the first to end takes the others along; let the one that records go first
            time.sleep(GRACE)
        if isinstance(error, LrkError):
            sys.exit(error.exit_code)
        from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

        ErrorHandler().record_exception(error)  # the parent shows it, unless this is only what another's death did
        sys.exit(1)
    finally:
        gc.freeze()  # see cli.main


if __name__ == "__main__":
    main()
