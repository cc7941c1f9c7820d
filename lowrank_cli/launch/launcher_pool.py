"""Runs started by one of Hydra's launchers: joblib, submitit (Slurm), Ray.

A launcher calls a function in processes of its own, which may be on other machines. There each run gets a child
process, so a killed run leaves the others alone. What a run prints goes to ``log.txt`` in its folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

from lowrank_cli.config.sweep import JobFolder, Launcher
from lowrank_cli.errors import LrkError, WorkFailed
from lowrank_cli.launch import child, pool
from lowrank_cli.runs import DONE, FAILED, INTERRUPTED, RUNNING, Run, is_alive, stopping

STOP_FILE = ".stop"  #: in the folder of the sweep or study: tells the launcher's processes, on any machine, to stop
WATCH = 1.0  # s between looks at the runs
_stop_requested = Event()  #: set when this process of a launcher gets a signal


def run_in_child(job: JobFolder) -> None:
    """Do one run in a child process, which is told to stop when the sweep or study is, or when this process is.

    After that no run starts here. It raises nothing.
    """
    folder, root = Path(job.folder), Path(job.root)
    stop = root / STOP_FILE
    if not stopping.handled():  # this is a process of the launcher
        for number in stopping.SIGNALS:
            signal.signal(number, lambda *_: _stop_requested.set())
    if _stop_requested.is_set() or stop.exists():
        return
    run = Run.open(folder)
    child.claim_gpu(run, root / pool.LOCKS)
    with run.file("log.txt").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "lowrank_cli.launch.launcher_child", str(folder), str(os.getpid())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    stop_sent = False
    while process.poll() is None:
        if not stop_sent and (_stop_requested.is_set() or stop.exists()):
            process.send_signal(signal.SIGUSR1)
            stop_sent = True
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=stopping.POLL)
    if not stop_sent:
        pool.record_death(Run.open(folder), process.returncode)


class LauncherPool:
    """The processes of a launcher.

    Args:
        launcher: starts them.
        root: folder of the sweep or study.
        again: how to continue, for the error of a launcher that fails.
        function: does one run in one of them; module-level, raises nothing.
    """

    def __init__(
        self, launcher: Launcher, root: Path, again: str, function: Callable[[JobFolder], None] = run_in_child
    ):
        self.launcher, self.root, self.again, self.function = launcher, root, again, function

    def run(self, folders: Sequence[Path], started: Callable[[Path], object], ended: Callable[[Path], object]) -> None:
        """See :class:`lowrank_cli.launch.pool.Pool`. Raises WorkFailed if the launcher fails."""
        stop, over = self.root / STOP_FILE, Event()
        before = {folder: Run.open(folder).info.get("ended") for folder in folders}
        stop.unlink(missing_ok=True)
        try:
            with stopping.on_stop(stop.touch), ThreadPoolExecutor(1) as watcher:
                watching = watcher.submit(_watch, dict(before), started, ended, over)
                try:
                    self._launch(before)
                finally:
                    over.set()
                watching.result()
        finally:
            stop.unlink(missing_ok=True)
        stopping.check()

    def _launch(self, before: Mapping[Path, str | None]) -> None:
        """Start the runs and wait. A launcher that breaks because one of its processes died is started once more.

        Args:
            before: the folders, and when their runs ended before, as far as they did.
        """
        todo, complete = list(before), False
        try:
            try:
                self.launcher.launch(self.function, self.root, todo)
            except BrokenExecutor:  # the launcher has ended its other processes too
                if stopping.requested():
                    raise
                while any(is_alive(Run.open(folder).info.get("process"), folder / "run.json") for folder in todo):
                    time.sleep(stopping.POLL)  # a run whose parent was killed stops itself
                if todo := [folder for folder, at in before.items() if not _has_ended(Run.open(folder), at)]:
                    self.launcher.launch(self.function, self.root, todo)
            complete = not stopping.requested()
        except LrkError:
            raise
        except Exception as error:
            if stopping.requested():  # the signal ended its processes too
                stopping.interrupt()
            raise WorkFailed(f"the launcher failed ({type(error).__name__}: {error}); {self.again}") from error
        finally:
            for run in map(Run.open, todo):
                if complete:
                    pool.record_death(run)
                elif run.info["status"] == RUNNING:  # the launcher ended its process
                    run.interrupt()


def _watch(
    waiting: dict[Path, str | None],
    started: Callable[[Path], object],
    ended: Callable[[Path], object],
    over: Event,
) -> None:
    """Tell of each run when it starts and ends, until all have ended or the launcher is done.

    Args:
        waiting: the folders, and when their runs ended before, as far as they did.
        over: the launcher is done.
    """
    begun: set[Path] = set()
    last = False
    while waiting and not last:
        last = over.wait(WATCH)
        for folder, before in list(waiting.items()):
            run = Run.open(folder)
            if _has_ended(run, before) or (run.info["status"] == INTERRUPTED and run.info.get("ended") != before):
                del waiting[folder]
                ended(folder)
            elif run.info["status"] == RUNNING and folder not in begun:
                begun.add(folder)
                started(folder)


def _has_ended(run: Run, before: str | None) -> bool:
    """Whether a run was done or failed since it was started; ``before`` is when it ended earlier, if it did."""
    return run.info["status"] in (DONE, FAILED) and run.info.get("ended") != before
