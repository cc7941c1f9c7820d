"""One run or one recipe, from the command line: start it, continue it, or look at what it would do."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from lowrank_cli import stages
from lowrank_cli.config.composition import Composed, refuse_code, restore
from lowrank_cli.errors import UserError
from lowrank_cli.launch import recipe, stage, study
from lowrank_cli.reader import read_json
from lowrank_cli.report import tables
from lowrank_cli.runs import Run, discard, is_alive, this_process
from lowrank_cli.runs.process import LAPSE
from lowrank_cli.runs.records import Working
from lowrank_cli.schema import TRUST
from lowrank_cli.terminal import Terminal

RECORDS = ("run.json", "sweep.json")  #: where a folder says which process works on it


def handler(verb: str) -> ModuleType:
    """The module that checks, creates, works and summarises runs of a verb."""
    return {"run": recipe, "study": study}.get(verb, stage)


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


def resume(verb: str, folder: str, typed: Sequence[str] = ()) -> None:
    """Continue the run in ``folder`` with its own configuration; ``typed`` may allow what no file can."""
    trusted = trusts(typed)
    run = Run.open(folder, key="--resume")
    used = run.info.get("stage")
    if used != verb:
        raise UserError(
            f"--resume: '{folder}' belongs to {used}; continue it with: lrk {used} --resume {shlex.quote(str(folder))}"
        )
    if run.done:
        raise UserError(f"--resume: '{folder}' is finished")
    refuse_running(run.path)
    refuse_to_act(run, trusted)
    try:
        handler(verb).work(run, restore(run))
    finally:
        show(run)


def trusts(typed: Sequence[str]) -> bool:
    """Whether the code of a resumed run's model may run. Raises UserError for any other override."""
    allowed = f"{TRUST}=true"
    if extra := [override for override in typed if override != allowed]:
        raise UserError(f"--resume: a run continues with its own configuration; leave out {' '.join(extra)}")
    return allowed in typed


def refuse_to_act(run: Run, trusted: bool) -> None:
    """Refuse to continue what would run a model's code, start a program or write outside of its folder.

    It may come from anybody. The first can be ``trusted``; the others would start again anyway.
    """
    for _, part in handler(run.info["stage"]).planned(run, restore(run)):
        if not trusted:
            refuse_code(part, tables.shown(run.path))
        if output := getattr(getattr(part.config, "generate", None), "output", None):
            raise UserError(
                f"--resume: '{tables.shown(run.path)}' would write generate.output={output}, outside of its folder; "
                f"start it anew"
            )
        if program := getattr(getattr(part.config, "bench", None), "vllm", None):
            raise UserError(
                f"--resume: '{tables.shown(run.path)}' would start the program bench.vllm={program}; start it anew"
            )


def refuse_running(folder: Path) -> None:
    """Two processes must not write into one folder: not into a job or a stage in it, nor where it is one itself."""
    above = [parent / name for parent in list(folder.absolute().parents)[:2] for name in RECORDS]
    for file in (*above, *(path for name in RECORDS for path in folder.rglob(name))):
        process = read_json(file, Working).get("process") if file.is_file() else None
        if process is not None and process != this_process() and is_alive(process, file):
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
        Terminal(stderr=verb in stages.PRINTS).print(handler(verb).summary(run), crop=False)
