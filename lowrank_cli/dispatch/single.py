"""One run or one recipe, from the command line: start it, continue it, or look at what it would do."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import ModuleType

from rich.console import Console

from lowrank_cli import stages
from lowrank_cli.config.composition import Composed, restore
from lowrank_cli.dispatch import recipe, stage
from lowrank_cli.errors import UserError
from lowrank_cli.report import tables
from lowrank_cli.runs import Run, discard, is_alive, read_json, this_process
from lowrank_cli.runs.process import LAPSE

RECORDS = ("run.json", "sweep.json")  #: where a folder says which process works on it


def handler(verb: str) -> ModuleType:
    """The module that checks, creates, works and summarises runs of a verb."""
    return recipe if verb == "run" else stage


def preview(verb: str, overrides: list[str], config_dir: str | None) -> list[tuple[str, Composed]]:
    """What would run, by name, checked."""
    module = handler(verb)
    return module.parts(module.check(verb, overrides, config_dir), config_dir)


def start(verb: str, overrides: list[str], config_dir: str | None, command: str) -> None:
    """Check, make the folder, do the work, show the outcome."""
    module = handler(verb)
    composed = module.check(verb, overrides, config_dir)
    run = module.create(composed, config_dir, command)
    try:
        module.work(run, composed)
    except UserError:
        take_back(run.path, composed.config.outputs)
        raise
    finally:
        show(run)


def resume(verb: str, folder: str) -> None:
    """Continue the run in ``folder`` with its own configuration."""
    run = Run.open(folder, key="--resume")
    used = run.info.get("stage")
    if used != verb:
        raise UserError(
            f"--resume: '{folder}' belongs to {used}; continue it with: lrk {used} --resume {shlex.quote(str(folder))}"
        )
    if run.done:
        raise UserError(f"--resume: '{folder}' is finished")
    refuse_running(run.path)
    try:
        handler(verb).work(run, restore(run))
    finally:
        show(run)


def refuse_running(folder: Path) -> None:
    """Two processes must not write into one folder: not into a job or a stage in it, nor where it is one itself."""
    above = [parent / name for parent in list(folder.absolute().parents)[:2] for name in RECORDS]
    for file in (*above, *(path for name in RECORDS for path in folder.rglob(name))):
        process = read_json(file).get("process") if file.is_file() else None
        if process != this_process() and is_alive(process, file):
            where, machine = tables.shown(file.parent), process["host"]
            if machine != this_process()["host"]:
                patience = f"; after a kill, wait {LAPSE * process['beat']} s"
                raise UserError(f"--resume: '{where}' is running on '{machine}'; end that first{patience}")
            raise UserError(f"--resume: '{where}' is running (process {process['pid']}); end that first")


def take_back(path: Path, outputs: str) -> None:
    """Remove a new folder in which nothing was computed: a user's mistake leaves nothing behind."""
    if not any(path.rglob("history.jsonl")) and not any(path.rglob("metrics.json")):
        discard(path, outputs)


def show(run: Run) -> None:
    """The table at the end."""
    if run.path.is_dir():
        verb = run.info["stage"]
        Console(stderr=verb in stages.PRINTS).print(handler(verb).summary(run), crop=False)
