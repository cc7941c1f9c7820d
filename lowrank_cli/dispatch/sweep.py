"""A sweep: one run folder for each combination of values, all prepared and checked before the first starts.

``outputs/<date>/<time>-sweep[-<name>]/`` holds ``sweep.json`` (what was asked for, and the jobs with their states)
and one run folder for each job, named by a hash of its configuration and, to read, what varies. A failed job says
so in its own folder at once and lets the others go on; whatever is not done can be continued.
"""

from __future__ import annotations

import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypedDict

from lowrank_cli.config.composition import Composed, restore
from lowrank_cli.config.sweep import Job, Launcher, expand, is_launcher_override, saved_launcher
from lowrank_cli.dispatch import devices
from lowrank_cli.dispatch.single import handler, refuse_running, refuse_to_act, trusts
from lowrank_cli.dispatch.stage import Interrupted
from lowrank_cli.errors import LrkError, UserError, WorkFailed, escaped
from lowrank_cli.reader import PlainName, read_json
from lowrank_cli.report import tables
from lowrank_cli.runs import (
    DONE,
    INTERRUPTED,
    PENDING,
    RUNNING,
    Run,
    child,
    config_hash,
    new_folder,
    this_process,
    write_json,
)
from lowrank_cli.runs.records import Stage, Working
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


DEVICES = ".devices"  #: of the sweep's folder: the locks by which its processes share GPUs


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
    key, _, value = override.partition("=")
    leaf = "" if re.fullmatch(r"method|model|task|hardware|recipe|run", key) else key.rpartition(".")[2]
    return re.sub(r"[^\w.]+", "-", leaf + Path(value).name.strip("'")).strip("-.")


def start(verb: str, overrides: list[str], config_dir: str | None, command: str) -> None:
    """Check all jobs, make their folders, and run them."""
    launcher, jobs = check(verb, overrides, config_dir)
    first = next(iter(jobs.values())).config
    folder = new_folder(first.outputs, "-".join(["sweep", *([first.name] if first.name else [])]))
    for name, composed in jobs.items():
        handler(verb).create(composed, config_dir, shlex.join(["lrk", verb, *composed.overrides]), folder / name)
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
    return (Path(folder) / LEDGER).is_file()


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
    _work(Path(folder), ledger)


def _jobs(folder: Path, ledger: dict[str, Any]) -> list[Run]:
    return [Run.open(child(folder, job["id"])) for job in ledger["jobs"]]


def _work(folder: Path, ledger: dict[str, Any]) -> None:
    jobs = _jobs(folder, ledger)
    again = f"continue with: lrk {ledger['stage']} -m --resume {tables.typed(folder)}"
    status = INTERRUPTED
    write_json(folder / LEDGER, {**ledger, "status": RUNNING, "process": this_process()})
    try:
        todo = [job.path.absolute() for job in jobs if not job.done]
        Launcher(ledger["launcher"]).launch(run_job, folder, todo)
        status = DONE
    except KeyboardInterrupt:
        raise Interrupted(again) from None
    except Exception as error:
        raise WorkFailed(f"the launcher failed ({type(error).__name__}: {error}); {again}") from error
    finally:
        jobs = _jobs(folder, ledger)
        for job in jobs:
            if job.info["status"] == RUNNING and status == INTERRUPTED:  # the launcher ended its process
                job.interrupt()
            elif job.info["status"] in (RUNNING, PENDING) and status == DONE:
                job.fail("the process ended without a result")
        states = [{**entry, "status": job.info["status"]} for entry, job in zip(ledger["jobs"], jobs, strict=True)]
        failed = [job for job in jobs if not job.done]
        status = "failed" if status == DONE and failed else status
        write_json(folder / LEDGER, {**ledger, "status": status, "jobs": states})
        Terminal().print(tables.end_of_sweep(folder, jobs), crop=False)
    if failed:
        jobs_are = f"{tables.jobs_of(len(jobs))} {'is' if len(failed) == 1 else 'are'}"
        raise WorkFailed(f"{len(failed)} of {jobs_are} not done; {again}")


def run_job(job: Job) -> None:
    """One job, in this process or in a launcher's. It never raises, except for Ctrl-C."""
    run = Run.open(job.folder)
    terminal = Terminal(stderr=True)
    with ExitStack() as stack:
        if read_json(run.path.parent / LEDGER, Ledger)["process"] == this_process():
            terminal.print(f"job {run.path.name}")
        else:  # several at once: each writes into its own file
            log = stack.enter_context(run.file("log.txt").open("a", encoding="utf-8", buffering=1))
            stack.enter_context(redirect_stdout(log))
            stack.enter_context(redirect_stderr(log))
            terminal = Terminal(file=sys.__stderr__)
            hardware = run.config().get("hardware", {})
            if (hardware.get("device"), hardware.get("processes")) == ("cuda", 1):
                devices.take_one(run.path.parent / DEVICES)
        try:
            handler(run.info["stage"]).work(run, restore(run))
        except Interrupted:
            raise KeyboardInterrupt from None
        except LrkError as error:
            print(f"error: {error}", file=sys.stderr)
        except Exception:
            print(escaped(traceback.format_exc()), file=sys.stderr)
    terminal.print(f"job {run.path.name}: {run.info['status']}")
