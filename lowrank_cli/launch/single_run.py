"""One run or one recipe, from the command line: start it, resume it, or preview it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from lowrank_cli import stages
from lowrank_cli.config.composition import Composed, refuse_code, restore
from lowrank_cli.config.sweep import is_launcher_override
from lowrank_cli.errors import UserError
from lowrank_cli.launch import recipe, stage, study
from lowrank_cli.launch.nodes import this_node
from lowrank_cli.launch.running import refuse_running
from lowrank_cli.report import path_format
from lowrank_cli.runs import Run, discard
from lowrank_cli.schema import LOOPBACK, TRUST
from lowrank_cli.terminal import Terminal

COUNTS = ("hardware.processes=", "hardware.nodes=")  #: what a resumed training may change


def handler(verb: str) -> ModuleType:
    """The module with ``plan``, ``create``, ``work``, ``remaining`` and ``summary`` for the runs of a verb."""
    return {"run": recipe, "study": study}.get(verb, stage)


def preview(verb: str, overrides: list[str], config_dir: str | None) -> list[tuple[str, Composed]]:
    """The checked configuration of each stage that would run, by name."""
    return handler(verb).plan(verb, overrides, config_dir)[1]


def start(verb: str, overrides: list[str], config_dir: str | None, command: str, *, save: bool = True) -> None:
    """Check, make the run folder, do the work, print the summary.

    Args:
        save: false to keep no run folder of the answer to one prompt, unless ``name`` or ``outputs`` are given.
    """
    module = handler(verb)
    composed, stages_of = module.plan(verb, overrides, config_dir)
    if not save and composed.config.generate.tenants is None and not composed.keys & {"name", "outputs"}:
        with TemporaryDirectory() as folder:
            module.work(module.create(composed, config_dir, command, Path(folder) / "run"), composed)
        return
    if module is not stage:
        _refuse_nodes(verb, stages_of)
    node = this_node(composed.config)
    if node and node.rank:
        module.work(Run.open(node.ask(), writes=False), composed)
        return
    run = module.create(composed, config_dir, command)
    told = node and node.tell(run.path)  # until the end
    try:
        module.work(run, composed)
    except UserError:
        take_back(run.path, composed.config.outputs)
        raise
    finally:
        del told
        show(run)


def _refuse_nodes(verb: str, stages_of: list[tuple[str, Composed]]) -> None:
    """Refuse a recipe or study on several nodes."""
    for name, composed in stages_of:
        if (nodes := getattr(getattr(composed.config, "hardware", None), "nodes", 1)) > 1:
            raise UserError(f"hardware.nodes: {nodes}, but lrk {verb} runs on one; start its stage {name} by itself")


def resume(verb: str, folder: str, typed: Sequence[str] = ()) -> None:
    """Resume the run in ``folder`` with its saved configuration.

    Args:
        typed: overrides of the command line: trust in the code of a model, for a study another launcher, and for a
            training another number of processes.
    """
    launcher = [override for override in typed if verb == "study" and is_launcher_override(override)]
    counts = [override for override in typed if verb == "train" and override.startswith(COUNTS)]
    trusted = trusts([override for override in typed if override not in [*launcher, *counts]])
    run = Run.open(folder, key="--resume")
    used = run.info.get("stage")
    if used != verb:
        raise UserError(
            f"--resume: '{folder}' belongs to {used}; continue it with: lrk {used} --resume {shlex.quote(str(folder))}"
        )
    if run.done:
        raise UserError(f"--resume: '{folder}' is finished")
    refuse_to_act(run, trusted)
    composed = with_processes(run, counts) if counts else restore(run)
    node = this_node(composed.config)
    if node and node.rank:
        handler(verb).work(Run.open(folder, writes=False), composed)
        return
    refuse_running(run.path)
    if verb == "study":
        study.set_launcher(run, launcher)
    if counts:
        run.set_config(composed.resolved)
    try:
        handler(verb).work(run, composed)
    finally:
        show(run)


def with_processes(run: Run, counts: Sequence[str]) -> Composed:
    """The configuration of a training with the numbers of processes in ``counts``, such as ``hardware.processes=4``.

    Raises UserError.
    """
    config = run.config("hardware.processes")
    for override in counts:
        key, _, value = override.partition("=")
        if not value.isdecimal():
            raise UserError(f"{key}: '{value}' is not a whole number (allowed: 1 or more)")
        config["hardware"][key.partition(".")[2]] = int(value)
    composed = restore(run, config)
    stage.check_shares(composed.config)
    return composed


def trusts(typed: Sequence[str]) -> bool:
    """Whether ``typed`` lets a resumed run execute its model's code. Raises UserError for any other override."""
    allowed = f"{TRUST}=true"
    if extra := [override for override in typed if override != allowed]:
        raise UserError(f"--resume: a run continues with its own configuration; leave out {' '.join(extra)}")
    return allowed in typed


def refuse_to_act(run: Run, trusted: bool) -> None:
    """Refuse to resume a run that would run a model's code, start a program, write outside its folder or serve others.

    The folder may come from anybody.

    Args:
        trusted: whether the user allows the model's code.
    """
    for _, composed in handler(run.info["stage"]).remaining(run, restore(run)):
        if not trusted:
            refuse_code(composed, path_format.shown(run.path))
        if output := getattr(getattr(composed.config, "generate", None), "output", None):
            raise UserError(
                f"--resume: '{path_format.shown(run.path)}' would write generate.output={output}, outside its folder; "
                f"start it anew"
            )
        serve = getattr(composed.config, "serve", None)
        if serve is not None and (serve.host not in LOOPBACK or serve.adapters is not None):
            raise UserError(
                f"--resume: '{path_format.shown(run.path)}' would serve others with serve.host={serve.host}, "
                f"serve.adapters={serve.adapters}; start it anew"
            )
        if program := getattr(getattr(composed.config, "bench", None), "vllm", None):
            raise UserError(
                f"--resume: '{path_format.shown(run.path)}' would start the program bench.vllm={program}; start it anew"
            )


def take_back(path: Path, outputs: str) -> None:
    """Remove a new run folder without results: a user's mistake leaves nothing behind."""
    if not any(path.rglob("history.jsonl")) and not any(path.rglob("metrics.json")):
        discard(path, outputs)


def show(run: Run) -> None:
    """Print the summary of a run."""
    if run.path.is_dir():
        verb = run.info["stage"]
        Terminal(stderr=verb in stages.PRINTS).print(handler(verb).summary(run), crop=False)
