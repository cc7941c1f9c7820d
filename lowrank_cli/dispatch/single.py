"""One run or one recipe, from the command line: start it, continue it, or look at what it would do."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from lowrank_cli import stages
from lowrank_cli.config.composition import Composed, restore
from lowrank_cli.dispatch import recipe, stage
from lowrank_cli.errors import UserError
from lowrank_cli.runs import Run, discard, is_alive, this_process


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
    refuse_running(folder, run.info)
    try:
        handler(verb).work(run, restore(run))
    finally:
        show(run)


def refuse_running(folder: str, record: dict[str, Any]) -> None:
    """Two processes must not write into one folder. ``record`` is what the folder says of itself."""
    process = record.get("process")
    if process != this_process() and is_alive(process):
        raise UserError(f"--resume: '{folder}' is running (process {process['pid']}); end that first")


def take_back(path: Path, outputs: str) -> None:
    """Remove a new folder in which nothing was computed: a user's mistake leaves nothing behind."""
    if not any(path.rglob("history.jsonl")) and not any(path.rglob("metrics.json")):
        discard(path, outputs)


def show(run: Run) -> None:
    """The table at the end."""
    if run.path.is_dir():
        verb = run.info["stage"]
        Console(stderr=verb in stages.PRINTS).print(handler(verb).summary(run), crop=False)
