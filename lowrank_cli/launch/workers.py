"""Prepared run folders, worked on by a few child processes at a time.

A child is forked from a server that has imported the libraries once, so it starts in milliseconds, and it takes nothing
along when it fails or is killed. What it prints goes to ``log.txt`` in its run folder.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

from lowrank_cli import stages
from lowrank_cli.launch import child, pool, stage
from lowrank_cli.runs import Run, stopping
from lowrank_cli.runs.threads import available_cores

POLL = 0.1  # s between looks at the children
#: What the server imports.
PRELOADED = (*stages.STAGES.values(), "torch", "transformers", "accelerate", "datasets", "lowrank_cli.report.plots")


class Workers:
    """A number of child processes.

    Args:
        count: processes at a time; the cores are shared among them, one at least for each.
        locks: folder of the locks by which they share GPUs.
    """

    def __init__(self, count: int, locks: Path):
        self.count, self.locks = count, locks
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED])

    def run(self, folders: Sequence[Path], started: Callable[[Path], object], ended: Callable[[Path], object]) -> None:
        """See :class:`lowrank_cli.launch.pool.Pool`."""
        waiting = list(reversed(folders))
        working: dict[Path, BaseProcess] = {}
        with stopping.on_stop(lambda: _pass_on(working.values())):
            while working or (waiting and not stopping.requested()):
                while waiting and len(working) < self.count and not stopping.requested():
                    folder = waiting.pop()
                    working[folder] = self._start(folder)
                    started(folder)
                time.sleep(POLL)
                for folder in [folder for folder, child in working.items() if not child.is_alive()]:
                    code = working.pop(folder).exitcode
                    if not stopping.requested():
                        pool.record_death(Run.open(folder), code)
                    ended(folder)
        stopping.check()

    def _start(self, folder: Path) -> BaseProcess:
        threads = max(1, available_cores().count // self.count)
        child = self._context.Process(target=run_in_child, args=(str(folder), os.getcwd(), str(self.locks), threads))
        child.start()
        return child


def _pass_on(children: Iterable[BaseProcess]) -> None:
    for process in children:
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGUSR1)


def _stop_with_parent() -> None:
    """Stop when the process of the study ends, by a kill."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a child knows its parent"
    parent.join()
    os.kill(os.getpid(), signal.SIGUSR1)


def run_in_child(folder: str, directory: str, locks: str, threads: int) -> None:
    """The child process: one run, from its prepared folder."""
    os.chdir(directory)
    os.setsid()  # a Ctrl-C in the terminal reaches the parent alone, which passes it on
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    os.environ["OMP_NUM_THREADS"] = str(threads)
    Thread(target=_stop_with_parent, daemon=True).start()
    child.claim_gpu(Run.open(folder), Path(locks))
    code = child.do_run(Path(folder), stage.work)
    gc.freeze()  # see cli.main
    stopping.finish(code)
    sys.exit(code)
