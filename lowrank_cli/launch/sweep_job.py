"""One job of a sweep in a process of its own: ``python -m lowrank_cli.launch.sweep_job RUN_FOLDER PARENT``."""

from __future__ import annotations

import gc
import os
import signal
import sys

from lowrank_cli.errors import Interrupted
from lowrank_cli.launch.sweep import perform
from lowrank_cli.runs import stopping


def main() -> None:
    """The parent process, of number PARENT, reads in the folder how the work ended; this one's exit code says only
    whether it stopped."""
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
