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

GRACE = 3  # seconds for the first process to record the failure


def main() -> None:
    """Do this process's share. Only the first one writes into the run folder, where the parent reads the outcome."""
    stopping.with_parent(lambda: os._exit(1))  # once the parent is gone, another process may resume the run
    folder, *flags = sys.argv[1:]
    run = Run.open(folder, writes=os.environ["RANK"] == "0")
    try:
        with stopping.signals(), recorded(run):
            perform(run, restore(run), "--resume" in flags)
    except BaseException as error:
        stopped = isinstance(error, Interrupted) and error.exit_code == 128 + signal.SIGUSR1  # by the parent
        if not (run.writes or stopped):  # when this process ends, the agent stops the one that records the failure
            time.sleep(GRACE)
        if isinstance(error, LrkError):
            sys.exit(error.exit_code)
        from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

        ErrorHandler().record_exception(error)  # the parent shows it unless another worker failed first
        sys.exit(1)
    finally:
        gc.freeze()  # see cli.main


if __name__ == "__main__":
    main()
