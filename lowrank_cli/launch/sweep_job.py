"""One job of a sweep in its own process: ``python -m lowrank_cli.launch.sweep_job RUN_FOLDER PARENT``."""

from __future__ import annotations

import gc
import os
import signal
import sys

from lowrank_cli.errors import Interrupted
from lowrank_cli.launch.sweep import perform
from lowrank_cli.runs import stopping


def main() -> None:
    """Do the job. The parent (process id PARENT) reads the outcome in the run folder; the exit code only says whether
    a signal stopped the job."""
    code = 0
    stopping.with_parent(lambda: os.kill(os.getpid(), signal.SIGUSR1), int(sys.argv[2]))
    try:
        with stopping.signals():
            perform(sys.argv[1])
    except Interrupted as error:
        code = error.exit_code
    gc.freeze()  # see cli.main
    sys.exit(code)


if __name__ == "__main__":
    main()
