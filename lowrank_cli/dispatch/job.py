"""One job of a sweep in a process of its own: ``python -m lowrank_cli.dispatch.job RUN_FOLDER``."""

from __future__ import annotations

import gc
import os
import signal
import sys
from threading import Thread

from lowrank_cli.dispatch.sweep import perform
from lowrank_cli.errors import Interrupted
from lowrank_cli.runs import stopping


def main() -> None:
    """The parent process reads in the folder how the work ended; this one's exit code says only whether it stopped."""
    code = 0
    Thread(target=_stop_with_parent, daemon=True).start()
    try:
        with stopping.signals():
            perform(sys.argv[1])
    except Interrupted as error:
        code = error.exit_code
    gc.freeze()  # see cli.main
    sys.exit(code)


def _stop_with_parent() -> None:
    """The parent holds the other end of stdin, and writes nothing: it ends when the parent does."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGUSR1)


if __name__ == "__main__":
    main()
