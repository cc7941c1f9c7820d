"""One run of a launcher in its own process: ``python -m lowrank_cli.launch.launcher_child RUN_FOLDER PARENT``."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

from lowrank_cli.launch import child
from lowrank_cli.launch.single_run import handler
from lowrank_cli.runs import Run, stopping


def main() -> None:
    """Do the run. The launcher's process (process id PARENT) reads the outcome in the run folder."""
    stopping.with_parent(lambda: os.kill(os.getpid(), signal.SIGUSR1), int(sys.argv[2]))
    folder = Path(sys.argv[1])
    code = child.do_run(folder, handler(Run.open(folder).info["stage"]).work)
    gc.freeze()  # see cli.main
    sys.exit(code)


if __name__ == "__main__":
    main()
