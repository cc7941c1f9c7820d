"""A sweep: one run folder for each combination of values, all prepared and checked before the first starts.

``outputs/<date>/<time>-sweep[-<name>]/`` holds ``sweep.json`` (the command, and the jobs with their states) and one run
folder for each job, named by a hash of its configuration and the values that vary. A job that fails records it in its
own folder and leaves the others alone; jobs that are not done can be resumed.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from lowrank_cli.config.composition import Composed
from lowrank_cli.config.sweep import JobFolder, Launcher, expand, is_launcher_override, saved_launcher
from lowrank_cli.errors import Interrupted, UserError, WorkFailed
from lowrank_cli.launch import stage
from lowrank_cli.launch.launcher_pool import LauncherPool, run_in_child
from lowrank_cli.launch.running import refuse_running
from lowrank_cli.launch.single_run import handler, refuse_to_act, trusts
from lowrank_cli.reader import PlainName, read_json
from lowrank_cli.report import number_format, path_format
from lowrank_cli.report.end_of_run import end_of_sweep
from lowrank_cli.runs import (
    DONE,
    FAILED,
    INTERRUPTED,
    RUNNING,
    Run,
    child,
    config_hash,
    discard,
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


class JobEntry(TypedDict):
    """One job of ``sweep.json``."""

    id: PlainName


class Ledger(Working):
    """``sweep.json``."""

    stage: Stage
    launcher: list[str]
    jobs: list[JobEntry]


class Job(NamedTuple):
    """One combination of the swept values."""

    composed: Composed
    stages: list[tuple[str, Composed]]  #: what the job would run, by name


def plan(verb: str, overrides: list[str], config_dir: str | None) -> tuple[list[str], dict[str, Job]]:
    """The launcher's overrides, and each checked job by its id."""
    launcher = [override for override in overrides if is_launcher_override(override)]
    Launcher(launcher)
    combinations = expand(verb, [override for override in overrides if override not in launcher], config_dir)
    shared = set(combinations[0]).intersection(*combinations)
    varying = {override for combination in combinations for override in combination} - shared
    jobs = {}
    for combination in combinations:
        job = Job(*handler(verb).plan(verb, combination, config_dir))
        label = "-".join(_label(override) for override in combination if override in varying)
        jobs[f"{config_hash(job.composed.resolved)[:8]}-{label}".strip("-")[:80]] = job
    return launcher, jobs


def _label(override: str) -> str:
    """An override as part of a folder's name: its value, after the key unless that is a group."""
    setting = Override.parse(override)
    leaf = "" if re.fullmatch(r"method|model|task|hardware|recipe|run", setting.key) else setting.key.rpartition(".")[2]
    return re.sub(r"[^\w.]+", "-", leaf + Path(setting.value).name.strip("'")).strip("-.")


def start(verb: str, overrides: list[str], config_dir: str | None, command: str) -> None:
    """Check all jobs, make their folders, and run them."""
    launcher, jobs = plan(verb, overrides, config_dir)
    first = next(iter(jobs.values())).composed.config
    folder = new_folder(first.outputs, "-".join(["sweep", *([first.name] if first.name else [])]))
    try:
        for name, job in jobs.items():
            command_of_job = shlex.join(["lrk", verb, *job.composed.overrides])
            handler(verb).create(job.composed, config_dir, command_of_job, folder / name)
    except BaseException:  # a full disk, a signal
        discard(folder, first.outputs)
        raise
    ledger = {
        "stage": verb,
        "command": command,
        "overrides": overrides,
        "launcher": launcher,
        "jobs": [{"id": name, "overrides": job.composed.overrides} for name, job in jobs.items()],
    }
    _work(folder, ledger)


def preview(verb: str, overrides: list[str], config_dir: str | None) -> list[tuple[str, Composed]]:
    """The checked configuration of each stage that would run, by ``JOB``, or ``JOB/STAGE`` for recipes."""
    _, jobs = plan(verb, overrides, config_dir)
    return [
        (name if len(job.stages) == 1 else f"{name}/{stage}", composed)
        for name, job in jobs.items()
        for stage, composed in job.stages
    ]


def is_sweep(folder: str) -> bool:
    return os.path.isfile(Path(folder) / LEDGER)  # False for an invalid path


def resume(verb: str, folder: str, typed: Sequence[str] = ()) -> None:
    """Start or resume the jobs that are not done.

    Args:
        typed: overrides of the command line: another launcher, or trust in the code of a model.
    """
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
    again = f"continue with: lrk {ledger['stage']} -m --resume {path_format.typed(folder)}"
    status = INTERRUPTED
    write_json(folder / LEDGER, {**ledger, "status": RUNNING, "process": this_process()})
    todo = [job.path.absolute() for job in _jobs(folder, ledger) if not job.done]
    try:
        with showing_life(folder / LEDGER):
            LauncherPool(Launcher(ledger["launcher"]), folder, again, run_job).run(todo, _ignore, _ignore)
        status = DONE
    except KeyboardInterrupt:
        raise Interrupted(again, stopping.exit_code()) from None
    finally:
        jobs = _jobs(folder, ledger)
        states = [{**entry, "status": job.info["status"]} for entry, job in zip(ledger["jobs"], jobs, strict=True)]
        failed = [job for job in jobs if not job.done]
        status = FAILED if status == DONE and failed else status
        write_json(folder / LEDGER, {**ledger, "status": status, "jobs": states})
        Terminal().print(end_of_sweep(folder, jobs), crop=False)
    if failed:
        jobs_are = f"{number_format.jobs_of(len(jobs))} {'is' if len(failed) == 1 else 'are'}"
        raise WorkFailed(f"{len(failed)} of {jobs_are} not done; {again}")


def _ignore(folder: Path) -> None:
    """The jobs tell of themselves; see :func:`run_job`."""


def run_job(job: JobFolder) -> None:
    """Do one job: in the sweep's own process directly, in a launcher's process in a child.

    Raises:
        KeyboardInterrupt: a signal stopped the sweep's own process. Nothing else is raised.
    """
    folder = Path(job.folder)
    if stopping.handled():
        Terminal(stderr=True).print(f"job {folder.name}")
        run = Run.open(folder)
        with stopping.on_stop(stopping.interrupt):
            try:
                stage.attempt(run, handler(run.info["stage"]).work)
            except Interrupted:
                raise KeyboardInterrupt from None
    else:
        run_in_child(job)
    status = Run.open(folder).info["status"]
    Terminal(file=sys.__stderr__).print(f"job {folder.name}: {status}")
