"""A sweep: one run folder for each combination of values, all prepared and checked before the first starts.

``outputs/<date>/<time>-sweep[-<name>]/`` holds ``sweep.json`` (what was asked for, and the jobs with their states)
and one run folder for each job, named by a hash of its configuration and, to read, what varies. A failed job says
so in its own folder at once and lets the others go on; whatever is not done can be continued.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any, TypedDict

from lowrank_cli.config.composition import Composed
from lowrank_cli.config.sweep import Job, Launcher, expand, is_launcher_override, saved_launcher
from lowrank_cli.errors import Interrupted, LrkError, UserError, WorkFailed
from lowrank_cli.launch import gpu_locks, stage
from lowrank_cli.launch.single_run import handler, refuse_running, refuse_to_act, trusts
from lowrank_cli.reader import PlainName, read_json
from lowrank_cli.report import tables
from lowrank_cli.runs import (
    DONE,
    FAILED,
    INTERRUPTED,
    PENDING,
    RUNNING,
    Run,
    child,
    config_hash,
    discard,
    is_alive,
    new_folder,
    remove_leftovers,
    showing_life,
    stopping,
    this_process,
    write_json,
)
from lowrank_cli.runs.records import Stage, Working
from lowrank_cli.schema import Override
from lowrank_cli.terminal import Terminal

LEDGER = "sweep.json"
STOP = ".stop"  #: of the sweep's folder: tells the processes of a launcher, on whatever machine, to stop
DEVICES = ".devices"  #: of the sweep's folder: the locks by which its processes share GPUs
NOTHING = "the process ended without a result"
_asked = Event()  #: a launcher's process got a signal


class JobEntry(TypedDict):
    """One job of ``sweep.json``."""

    id: PlainName


class Ledger(Working):
    """``sweep.json``."""

    stage: Stage
    launcher: list[str]
    jobs: list[JobEntry]


def check(verb: str, overrides: list[str], config_dir: str | None) -> tuple[list[str], dict[str, Composed]]:
    """The launcher's overrides, and each job's checked configuration by its id."""
    launcher = [override for override in overrides if is_launcher_override(override)]
    Launcher(launcher)
    combinations = expand(verb, [override for override in overrides if override not in launcher], config_dir)
    varying = {override for job in combinations for override in job if not all(override in o for o in combinations)}
    jobs = {}
    for job in combinations:
        composed = handler(verb).check(verb, job, config_dir)
        label = "-".join(_readable(override) for override in job if override in varying)
        jobs[f"{config_hash(composed.resolved)[:8]}-{label}".strip("-")[:80]] = composed
    return launcher, jobs


def _readable(override: str) -> str:
    setting = Override.parse(override)
    leaf = "" if re.fullmatch(r"method|model|task|hardware|recipe|run", setting.key) else setting.key.rpartition(".")[2]
    return re.sub(r"[^\w.]+", "-", leaf + Path(setting.value).name.strip("'")).strip("-.")


def start(verb: str, overrides: list[str], config_dir: str | None, command: str) -> None:
    """Check all jobs, make their folders, and run them."""
    launcher, jobs = check(verb, overrides, config_dir)
    first = next(iter(jobs.values())).config
    folder = new_folder(first.outputs, "-".join(["sweep", *([first.name] if first.name else [])]))
    try:
        for name, composed in jobs.items():
            handler(verb).create(composed, config_dir, shlex.join(["lrk", verb, *composed.overrides]), folder / name)
    except BaseException:  # a full disk, a signal
        discard(folder, first.outputs)
        raise
    ledger = {
        "stage": verb,
        "command": command,
        "overrides": overrides,
        "launcher": launcher,
        "jobs": [{"id": name, "overrides": composed.overrides} for name, composed in jobs.items()],
    }
    _work(folder, ledger)


def preview(verb: str, overrides: list[str], config_dir: str | None) -> list[tuple[str, Composed]]:
    """What would run, by name, checked."""
    _, jobs = check(verb, overrides, config_dir)
    return [
        (job if len(parts) == 1 else f"{job}/{name}", part)
        for job, composed in jobs.items()
        for parts in [handler(verb).parts(composed, config_dir)]
        for name, part in parts
    ]


def is_sweep(folder: str) -> bool:
    return os.path.isfile(Path(folder) / LEDGER)  # no for whatever cannot be a path


def resume(verb: str, folder: str, typed: Sequence[str] = ()) -> None:
    """Run the jobs that are not done, each from where it stands; ``typed`` may name another launcher."""
    ledger = read_json(Path(folder) / LEDGER, Ledger)
    launcher = [override for override in typed if is_launcher_override(override)]
    trusted = trusts([override for override in typed if override not in launcher])
    if ledger["stage"] != verb:
        raise UserError(f"--resume: '{folder}' is a sweep of {ledger['stage']}, not of {verb}")
    jobs = _jobs(Path(folder), ledger)
    if all(run.done for run in jobs):
        raise UserError(f"--resume: all jobs of '{folder}' are finished")
    refuse_running(Path(folder))
    for run in jobs:
        if not run.done:
            refuse_to_act(run, trusted)
    ledger["launcher"] = launcher or saved_launcher(ledger["launcher"])
    Launcher(ledger["launcher"])
    remove_leftovers(Path(folder))
    _work(Path(folder), ledger)


def _jobs(folder: Path, ledger: dict[str, Any]) -> list[Run]:
    return [Run.open(child(folder, job["id"])) for job in ledger["jobs"]]


def _work(folder: Path, ledger: dict[str, Any]) -> None:
    again = f"continue with: lrk {ledger['stage']} -m --resume {tables.typed(folder)}"
    status = INTERRUPTED
    (folder / STOP).unlink(missing_ok=True)
    write_json(folder / LEDGER, {**ledger, "status": RUNNING, "process": this_process()})
    try:
        with showing_life(folder / LEDGER), stopping.on_stop((folder / STOP).touch):
            _launch(folder, ledger)
        if stopping.requested():
            stopping.interrupt()
        status = DONE
    except KeyboardInterrupt:
        raise Interrupted(again, stopping.exit_code()) from None
    except LrkError:
        raise
    except Exception as error:
        raise WorkFailed(f"the launcher failed ({type(error).__name__}: {error}); {again}") from error
    finally:
        jobs = _jobs(folder, ledger)
        for job in jobs:
            if job.info["status"] == RUNNING and status == INTERRUPTED:  # the launcher ended its process
                job.interrupt()
            elif job.info["status"] in (RUNNING, PENDING) and status == DONE:
                job.fail(NOTHING)
        states = [{**entry, "status": job.info["status"]} for entry, job in zip(ledger["jobs"], jobs, strict=True)]
        failed = [job for job in jobs if not job.done]
        status = "failed" if status == DONE and failed else status
        (folder / STOP).unlink(missing_ok=True)
        write_json(folder / LEDGER, {**ledger, "status": status, "jobs": states})
        Terminal().print(tables.end_of_sweep(folder, jobs), crop=False)
    if failed:
        jobs_are = f"{tables.jobs_of(len(jobs))} {'is' if len(failed) == 1 else 'are'}"
        raise WorkFailed(f"{len(failed)} of {jobs_are} not done; {again}")


def _launch(folder: Path, ledger: dict[str, Any]) -> None:
    """Run the jobs that are not done. A launcher that breaks, as one of its processes was killed, starts once more."""
    launcher, broken = Launcher(ledger["launcher"]), False
    todo = [job.path.absolute() for job in _jobs(folder, ledger) if not job.done]
    while todo:
        try:
            launcher.launch(run_job, folder, todo)
            return
        except BrokenExecutor:  # and the launcher has ended all of its other processes
            if broken or stopping.requested():
                raise
        broken, ended = True, (DONE, FAILED)
        while any(is_alive(job.info.get("process"), job.path / "run.json") for job in _jobs(folder, ledger)):
            time.sleep(stopping.POLL)  # a job whose parent was killed stops by itself
        todo = [job.path.absolute() for job in _jobs(folder, ledger) if job.info["status"] not in ended]


def run_job(job: Job) -> None:
    """One job: in this process where the sweep itself runs, and in a child of a launcher's process. It never raises,
    except for a stop in this process.

    A child that is killed takes no other job along, as a process of the launcher would.
    """
    folder = Path(job.folder)
    if read_json(folder.parent / LEDGER, Ledger)["process"] == this_process():
        Terminal(stderr=True).print(f"job {folder.name}")
        with stopping.on_stop(stopping.interrupt):
            try:
                perform(folder)
            except Interrupted:
                raise KeyboardInterrupt from None
    else:
        _in_child(folder)
    status = Run.open(folder).info["status"]
    Terminal(file=sys.__stderr__).print(f"job {folder.name}: {status}")


def perform(folder: str | os.PathLike[str]) -> None:
    """Do a job's work. Raises nothing but Interrupted: what failed is in the run's folder, and on stderr."""
    run = Run.open(folder)
    stage.attempt(run, handler(run.info["stage"]).work)


def _in_child(folder: Path) -> None:
    """Run a job in a child of this process, whose output goes to the job's ``log.txt``.

    It is asked to stop when the sweep is, or when this process gets a signal, from then on for all jobs.
    """
    stop = folder.parent / STOP
    for number in stopping.SIGNALS:
        signal.signal(number, lambda *_: _asked.set())
    if _asked.is_set() or stop.exists():
        return
    run = Run.open(folder)
    hardware = run.config().get("hardware", {})
    if (hardware.get("device"), hardware.get("processes")) == ("cuda", 1):
        gpu_locks.take_one(folder.parent / DEVICES)
    with run.file("log.txt").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "lowrank_cli.launch.sweep_job", str(folder), str(os.getpid())]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    handed_on = False
    while child.poll() is None:
        if not handed_on and (_asked.is_set() or stop.exists()):
            child.send_signal(signal.SIGUSR1)
            handed_on = True
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=stopping.POLL)
    run = Run.open(folder)
    if run.info["status"] in (PENDING, RUNNING) and not handed_on:
        killed = child.returncode < 0
        run.fail(f"its process was killed ({signal.Signals(-child.returncode).name})" if killed else NOTHING)
