"""A recipe: stages in a row, each in its own folder, all checked before the first starts.

``outputs/<date>/<time>-recipe-<name>/`` is itself a run folder, with ``recipe.json`` (the stages and their states)
and one run folder ``<nn>-<stage name>`` for each stage. In the overrides of a stage, ``{name}`` stands for the run
folder of the earlier stage of that name; a stage with ``run={name}`` inherits model, task, method and hardware from it.
What the user sets goes to every stage that knows the key, except that a stage with ``run={name}`` accepts those four
only where its own overrides set them too.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Group, RenderableType

from lowrank_cli import methods, stages
from lowrank_cli.config.composition import ONLY_TYPED, STARTED, WRITTEN, Composed, Source, compose, rebuild, restore
from lowrank_cli.config.errors import unknown_key
from lowrank_cli.config.folders import GROUPS
from lowrank_cli.config.keys import flat, knows
from lowrank_cli.errors import UserError, unknown
from lowrank_cli.launch import stage
from lowrank_cli.reader import PlainName
from lowrank_cli.report import path_format, selections, tables
from lowrank_cli.report.end_of_run import next_steps
from lowrank_cli.runs import PENDING, Run, child
from lowrank_cli.runs.records import Stage
from lowrank_cli.schema import TRUST, VERBS, Override, RecipeRun, parse_overrides

LEDGER = "recipe.json"


class StageEntry(TypedDict):
    """One stage of ``recipe.json``."""

    name: str
    stage: Stage
    folder: PlainName


class Ledger(TypedDict):
    """``recipe.json``."""

    config_dir: str | None
    stages: list[StageEntry]


def plan(verb: str, overrides: list[str], config_dir: str | None) -> tuple[Composed, list[tuple[str, Composed]]]:
    """The checked configuration of a new recipe run, and of each of its stages by name.

    What the user sets beyond the recipe's own keys is added to the overrides of the stages that know the key.
    """
    keys = {item.name for item in fields(RecipeRun)}
    for_recipe = [override for override in overrides if _is_for_recipe(Override.parse(override), keys)]
    composed = compose(verb, for_recipe, config_dir)
    values = composed.resolved
    entries = values["recipe"]["stages"]
    for entry in entries:
        for item in parse_overrides(entry["overrides"]):
            if item.key in (TRUST, WRITTEN, STARTED):
                name = composed.config.recipe.name
                raise UserError(f"recipe {name}, stage '{entry['name']}': {item.key}: {ONLY_TYPED}")
    for override in overrides:
        if override not in for_recipe:
            key = Override.parse(override).key
            accepting = [entry for entry in entries if _accepts(entry, key)]
            if not accepting and re.fullmatch(r"(?!hydra)\w+(\.\w+)*", key):
                raise UserError(f"recipe {composed.config.recipe.name}: {unknown_key(key, _known(entries))}")
            for entry in accepting or entries[:1]:  # composing the first stage then reports the mistake
                entry["overrides"].append(override)
    composed = rebuild(verb, values, composed.choices, overrides)
    planned = _compose_stages(composed, config_dir)
    for entry, (_, stage_config) in zip(entries, planned, strict=True):
        entry["overrides"] = _with_absolute_folders(entry["overrides"], stage_config.inputs)
    return rebuild(verb, values, composed.choices, overrides), planned


def _compose_stages(composed: Composed, config_dir: str | None) -> list[tuple[str, Composed]]:
    """The checked configuration of each stage by its name, as far as it is known before the earlier ones have run."""
    recipe = composed.config.recipe
    planned: dict[str, Composed] = {}
    for entry in recipe.stages:
        where = f"recipe {recipe.name}, stage '{entry.name}'"
        if entry.name in planned or not re.fullmatch(r"[\w-]+", entry.name):
            raise UserError(f"{where}: the name must be unique, of letters, digits, - and _")
        if entry.stage not in stages.IN_RECIPES:
            raise unknown(where, entry.stage, stages.IN_RECIPES)
        source = None
        inherited = _inherited(entry.overrides)
        if inherited is not None:
            if inherited not in planned:
                raise unknown(f"{where}, run", inherited, planned)
            earlier = planned[inherited]
            source = Source(f"{{{inherited}}}", earlier.resolved, earlier.choices)
        later = tuple(f"{{{name}}}" for name in planned)
        try:
            planned[entry.name] = stage.check(entry.stage, entry.overrides, config_dir, source, later)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not planned:
        raise UserError(f"recipe {recipe.name}: it has no stages")
    return list(planned.items())


def create(composed: Composed, config_dir: str | None, command: str, folder: Path | None = None) -> Run:
    """Make the recipe's folder with its ledger; :func:`work` starts from them."""
    run = stage.create(composed, config_dir, command, folder)
    entries = enumerate(composed.config.recipe.stages, 1)
    listed = [{"name": e.name, "stage": e.stage, "folder": f"{n:02d}-{e.name}", "status": PENDING} for n, e in entries]
    run.write_json(LEDGER, {"config_dir": config_dir and str(Path(config_dir).resolve()), "stages": listed})
    return run


def remaining(run: Run, composed: Composed) -> list[tuple[str, Composed]]:
    """The configurations that resuming ``run`` would execute, by name.

    A stage that was started is listed twice: as the recipe configures it, and as its own folder does.
    """
    ledger = _ledger(run, composed)
    runs = {name: _open(folder) for name, folder in _folders(run, ledger).items()}
    started = {name: stage_run for name, stage_run in runs.items() if stage_run is not None}
    done = {name for name, stage_run in started.items() if stage_run.done}
    configured = [item for item in _compose_stages(composed, ledger["config_dir"]) if item[0] not in done]
    return [*configured, *((name, restore(started[name])) for name in started if name not in done)]


def _ledger(run: Run, composed: Composed) -> dict[str, Any]:
    """``recipe.json``. Raises UserError if it does not list the stages of the recipe."""
    ledger = run.read_json(LEDGER, Ledger)
    listed = [entry["name"] for entry in ledger["stages"]]
    expected = [entry["name"] for entry in composed.resolved["recipe"]["stages"]]
    if listed != expected:
        raise UserError(f"{run.path / LEDGER}: the stages are {', '.join(listed)}; expected {', '.join(expected)}")
    return ledger


def _folders(run: Run, ledger: dict[str, Any]) -> dict[str, Path]:
    """The folder of each stage."""
    return {item["name"]: child(run.path.absolute(), item["folder"]) for item in ledger["stages"]}


def work(run: Run, composed: Composed) -> None:
    """Run the stages that are not done, in order; the last one's metrics are the recipe's."""
    ledger = _ledger(run, composed)
    run.begin()
    folders = _folders(run, ledger)
    with stage.recorded(run):
        for item, entry in zip(ledger["stages"], composed.config.recipe.stages, strict=True):
            stage_run = _open(folders[entry.name])
            if stage_run is None or stage_run.info["status"] == PENDING:
                overrides = [_fill_in(override, folders) for override in entry.overrides]
                ready = stage.check(entry.stage, overrides, ledger["config_dir"])
                command = shlex.join(["lrk", entry.stage, *overrides])
                stage_run = stage.create(ready, None, command, folders[entry.name])
            try:
                if not stage_run.done:
                    stage.work(stage_run, restore(stage_run))
            finally:
                item["status"] = stage_run.info["status"]
                run.write_json(LEDGER, ledger)
            run.update(peak_memory_bytes=max(r.info.get("peak_memory_bytes", 0) for r in (run, stage_run)))
        assert stage_run is not None, "a recipe without stages is refused"
        run.finish(stage_run.metrics)


def summary(run: Run) -> RenderableType:
    """A table of the stages, the modules that they selected, how methods compare over tasks, and what to do next."""
    runs = [(name, _open(folder)) for name, folder in _folders(run, run.read_json(LEDGER, Ledger)).items()]
    selected = [line for _, stage_run in runs if stage_run is not None for line in selections.shown(stage_run)]
    table = tables.stages_table(runs, path_format.shown(run.path))
    return Group(table, *selected, *selections.learned(runs), *next_steps(run))


def _open(folder: Path) -> Run | None:
    return Run.open(folder) if (folder / "run.json").is_file() else None


def _is_for_recipe(override: Override, keys: Collection[str]) -> bool:
    """Whether an override sets one of the recipe's own ``keys``, or is malformed, as composing the recipe reports."""
    return override.root in keys or not override.sets


def _accepts(entry: dict[str, Any], key: str) -> bool:
    """Whether a stage's verb and method know the key, and the stage does not inherit it from an earlier one."""
    overridden = any(override.key == key for override in parse_overrides(entry["overrides"]))
    inherits = _inherited(entry["overrides"]) is not None and Override.parse(key).root in GROUPS and key != TRUST
    known = entry["stage"] in VERBS and knows(VERBS[entry["stage"]], key)
    if key.startswith("method."):
        schema = _method_schema(entry)
        known = known and (schema is None or knows(schema, key.removeprefix("method.")))  # None: composing decides
    return known and (overridden or not inherits)


def _method_schema(entry: dict[str, Any]) -> type | None:
    """The schema of the method that a stage's overrides name; None if they name none."""
    chosen = [override.value for override in parse_overrides(entry["overrides"]) if override.key == "method"]
    return methods.config_classes().get(chosen[-1]) if chosen else None


def _known(entries: list[dict[str, Any]]) -> list[str]:
    """Every key that some stage accepts."""
    known: dict[str, None] = {}
    for entry in entries:
        schema = _method_schema(entry)
        keys = [*flat(VERBS.get(entry["stage"])), *(flat(schema, "method.") if schema else ())]
        known |= dict.fromkeys(key for key in keys if _accepts(entry, key))
    return list(known)


def _inherited(overrides: list[str]) -> str | None:
    """The name of the earlier stage in ``run={name}``, if there is one."""
    runs = [override.value for override in parse_overrides(overrides) if override.key == "run"]
    matches = [re.fullmatch(r"\{(.*)\}", value) for value in runs]
    return next((match[1] for match in reversed(matches) if match), None)


def _with_absolute_folders(overrides: list[str], inputs: dict[str, str]) -> list[str]:
    """The overrides with absolute folders, so that the recipe can be resumed from another directory.

    Args:
        inputs: the folders of the stage's checked configuration, by key.
    """
    parsed = parse_overrides(overrides)
    keys = {override.key for override in parsed}
    if _inherited(overrides) is None:
        keys |= {"model.path", "task.path"}  # their YAML files may name a folder
    folders = {key: path for key, path in inputs.items() if key in keys}
    others = [str(override) for override in parsed if override.key not in folders]
    return [*others, *(f"{key}={path}" for key, path in folders.items())]


def _fill_in(override: str, folders: dict[str, Path]) -> str:
    """``override`` with each ``{name}`` replaced by the folder of that stage."""
    for name, folder in folders.items():
        override = override.replace(f"{{{name}}}", str(folder))
    return override
