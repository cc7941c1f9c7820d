"""Where an adapter comes from: the earlier run that holds it, and the method and the task that made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from lowrank_cli import methods
from lowrank_cli.adapter.files import save_load
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Method
from lowrank_cli.reader import check
from lowrank_cli.runs import Run
from lowrank_cli.schema import RunConfig, TaskConfig, parse_overrides
from lowrank_cli.tasks.task import template_hashes


def newest_run_note(config: RunConfig, run: Run) -> str:
    """``run: PATH`` if ``config.run`` was not given on the command line but is the newest run; else empty."""
    path = getattr(config, "run", None)
    given = any(override.key.lstrip("+") == "run" for override in parse_overrides(run.info.get("overrides", ())))
    if path is None or given:
        return ""
    shown = Path(path)
    return f"run: {shown.relative_to(Path.cwd()) if shown.is_relative_to(Path.cwd()) else shown}"


def method_of(run: Run) -> Method:
    """The method of an earlier run, as it was configured. Raises UserError if its configuration does not fit."""
    return methods.configured(run.config("method.name")["method"], str(run.path / "config.yaml"))


class MadeBy(TypedDict):
    """The method that made an adapter outside of a run, as ``lrk.json`` records it."""

    method_config: dict[str, Any]


def method_of_adapter(folder: Path) -> Method:
    """The method that made the adapter in ``folder``, as ``lrk.json`` or else the run of the adapter says.

    Raises:
        UserError: neither says so.
    """
    about, file = save_load.read_proof(folder)["about"], f"{folder / save_load.PROOF}: about"
    if "method_config" in about:
        check(about, MadeBy, file)
        return methods.configured(about["method_config"], file)
    if folder.name == "adapter" and (folder.parent / "run.json").is_file():
        return method_of(Run.open(folder.parent))
    raise UserError(f"{folder}: {save_load.PROOF} does not say which method made the adapter; name its run")


class About(TypedDict):
    """The task that an adapter was trained on, in ``lrk.json``."""

    task: str
    template_hash: str
    parts: NotRequired[dict[str, str]]


class Chats(TypedDict):
    """The chat templates that an adapter was trained in, in ``lrk.json``: a hash by task."""

    chat: NotRequired[dict[str, str]]


def check_chat(hashes: Mapping[str, str], about: dict[str, Any], folder: Path) -> None:
    """Raise UserError if the adapter was trained on a task in another chat template.

    Args:
        hashes: of the chat templates now, by task.
        about: what the adapter's proof records.
        folder: of the adapter.
    """
    check(about, Chats, str(folder / save_load.PROOF), "about")
    for task, now in hashes.items():
        trained = about.get("chat", {}).get(task, now)
        if trained != now:
            raise UserError(
                f"task.chat: '{task}' was trained in another chat template or system turn (hash {trained[:12]}, now "
                f"{now[:12]}); give them by task.chat_template=FILE and task.system"
            )


def check_template(task: TaskConfig, folder: Path) -> None:
    """Compare the prompts of a task, or of each task of a mix, with those that an adapter was trained on.

    Args:
        folder: of the adapter.

    Raises:
        UserError: the same task with another template or other label words; the metrics would not be comparable.
    """
    about = save_load.read_proof(folder)["about"]
    check(about, About, str(folder / save_load.PROOF), "about")
    trained = {about["task"]: about["template_hash"], **about.get("parts", {})}
    for name, now in template_hashes(task).items():
        if trained.get(name, now) != now:
            raise UserError(
                f"task.template: '{name}' was trained with another template or other label words "
                f"(hash {trained[name][:12]}, now {now[:12]}); leave them as they were"
            )
