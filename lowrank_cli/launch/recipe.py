"""A recipe: stages in a row, each in its own folder, all checked before the first starts.

``outputs/<date>/<time>-recipe-<name>/`` is itself a run folder, with ``recipe.json`` (the stages and their states)
and one run folder ``<nn>-<stage name>`` for each stage. ``{name}`` in the overrides of a stage is the run folder of
the earlier stage of that name; a stage with ``run={name}`` takes model, task, method and hardware from there. What the
user sets goes to every stage that knows it; in one with ``run={name}``, of these four only what it sets itself.
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
from lowrank_cli.report import selections, tables
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


def check(verb: str, overrides: list[str], config_dir: str | None) -> Composed:
    """Compose the recipe, hand the other overrides to its stages, and check every stage."""
    keys = {item.name for item in fields(RecipeRun)}
    own = [override for override in overrides if _is_own(Override.parse(override), keys)]
    composed = compose(verb, own, config_dir)
    values = composed.resolved
    entries = values["recipe"]["stages"]
    for entry in entries:
        for item in parse_overrides(entry["overrides"]):
            if item.key in (TRUST, WRITTEN, STARTED):
                name = composed.config.recipe.name
                raise UserError(f"recipe {name}, stage '{entry['name']}': {item.key}: {ONLY_TYPED}")
    for override in overrides:
        if override not in own:
            key = Override.parse(override).key
            takers = [entry for entry in entries if _takes(entry, key)]
            if not takers and re.fullmatch(r"(?!hydra)\w+(\.\w+)*", key):
                raise UserError(f"recipe {composed.config.recipe.name}: {unknown_key(key, _known(entries))}")
            for entry in takers or entries[:1]:  # composing the first stage then says what is wrong
                entry["overrides"].append(override)
    composed = rebuild(verb, values, composed.choices, overrides)
    for entry, (_, part) in zip(entries, parts(composed, config_dir), strict=True):
        entry["overrides"] = _settled(entry["overrides"], part.inputs)
    return rebuild(verb, values, composed.choices, overrides)


def parts(composed: Composed, config_dir: str | None) -> list[tuple[str, Composed]]:
    """The configuration of each stage by its name, as far as it shows before the earlier ones have run."""
    recipe = composed.config.recipe
    planned: dict[str, Composed] = {}
    for entry in recipe.stages:
        where = f"recipe {recipe.name}, stage '{entry.name}'"
        if entry.name in planned or not re.fullmatch(r"[\w-]+", entry.name):
            raise UserError(f"{where}: the name must be unique, of letters, digits, - and _")
        if entry.stage not in stages.STAGES:
            raise unknown(where, entry.stage, stages.STAGES)
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
    """Make the recipe's folder and its ledger, where :func:`work` starts."""
    run = stage.create(composed, config_dir, command, folder)
    entries = enumerate(composed.config.recipe.stages, 1)
    listed = [{"name": e.name, "stage": e.stage, "folder": f"{n:02d}-{e.name}", "status": PENDING} for n, e in entries]
    run.write_json(LEDGER, {"config_dir": config_dir and str(Path(config_dir).resolve()), "stages": listed})
    return run


def planned(run: Run, composed: Composed) -> list[tuple[str, Composed]]:
    """What is left to run in the folder of ``run``, by name: as the recipe says, and as begun stages say themselves."""
    ledger = _ledger(run, composed)
    begun = {name: _open(folder) for name, folder in _folders(run, ledger).items()}
    done = {name for name, own in begun.items() if own is not None and own.done}
    left = [(name, part) for name, part in parts(composed, ledger["config_dir"]) if name not in done]
    return [*left, *((name, restore(own)) for name, own in begun.items() if own is not None and not own.done)]


def _ledger(run: Run, composed: Composed) -> dict[str, Any]:
    """``recipe.json``, which names the stages of the recipe."""
    ledger = run.read_json(LEDGER, Ledger)
    named, known = ([item["name"] for item in of] for of in (ledger["stages"], composed.resolved["recipe"]["stages"]))
    if named != known:
        raise UserError(f"{run.path / LEDGER}: the stages are {', '.join(named)}; expected {', '.join(known)}")
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
            part = _open(folders[entry.name])
            if part is None or part.info["status"] == PENDING:
                overrides = [_filled(override, folders) for override in entry.overrides]
                ready = stage.check(entry.stage, overrides, ledger["config_dir"])
                part = stage.create(ready, None, shlex.join(["lrk", entry.stage, *overrides]), folders[entry.name])
            try:
                if not part.done:
                    stage.work(part, restore(part))
            finally:
                item["status"] = part.info["status"]
                run.write_json(LEDGER, ledger)
            run.update(peak_memory_bytes=max(r.info.get("peak_memory_bytes", 0) for r in (run, part)))
        assert part is not None, "a recipe without stages is refused"
        run.finish(part.metrics)


def summary(run: Run) -> RenderableType:
    """One line for each stage, what several methods learned on the same tasks, and what to do next."""
    listed = [(name, _open(folder)) for name, folder in _folders(run, run.read_json(LEDGER, Ledger)).items()]
    kept = [line for _, part in listed if part is not None for line in selections.shown(part)]
    stages = tables.stages_table(listed, tables.shown(run.path))
    return Group(stages, *kept, *selections.learned(listed), *tables.next_steps(run))


def _open(folder: Path) -> Run | None:
    return Run.open(folder) if (folder / "run.json").is_file() else None


def _is_own(override: Override, keys: Collection[str]) -> bool:
    """Whether an override is for the recipe itself, which has these ``keys``; so is what is no override at all."""
    return override.root in keys or not override.sets


def _takes(entry: dict[str, Any], key: str) -> bool:
    """Whether a stage's verb and method know the key, and it sets it itself or does not get it from an earlier one."""
    own = any(override.key == key for override in parse_overrides(entry["overrides"]))
    inherits = (
        key.partition(".")[0] in GROUPS and key != TRUST and _inherited(entry["overrides"]) is not None and not own
    )
    known = entry["stage"] in VERBS and knows(VERBS[entry["stage"]], key)
    if key.startswith("method."):
        kind = _method(entry)  # none: left to composing
        known = known and (kind is None or knows(kind, key.removeprefix("method.")))
    return known and not inherits


def _method(entry: dict[str, Any]) -> type | None:
    """The schema of the method that a stage names."""
    chosen = [override.value for override in parse_overrides(entry["overrides"]) if override.key == "method"]
    return methods.config_classes().get(chosen[-1]) if chosen else None


def _known(entries: list[dict[str, Any]]) -> list[str]:
    """Every key that some stage takes."""
    found: dict[str, None] = {}
    for entry in entries:
        kind = _method(entry)
        keys = [*flat(VERBS.get(entry["stage"])), *(flat(kind, "method.") if kind else ())]
        found |= dict.fromkeys(key for key in keys if _takes(entry, key))
    return list(found)


def _inherited(overrides: list[str]) -> str | None:
    """The stage whose run this one reads."""
    named = [override.value for override in parse_overrides(overrides) if override.key == "run"]
    found = [re.fullmatch(r"\{(.*)\}", value) for value in named]
    return next((match[1] for match in reversed(found) if match), None)


def _settled(overrides: list[str], inputs: dict[str, str]) -> list[str]:
    """The overrides with each folder as it was checked: the recipe may be continued from another directory."""
    parsed = parse_overrides(overrides)
    given = {override.key for override in parsed}
    own = set() if _inherited(overrides) is not None else {"model.path", "task.path"}  # a YAML may name them
    folders = {key: path for key, path in inputs.items() if key in given | own}
    rest = [str(override) for override in parsed if override.key not in folders]
    return [*rest, *(f"{key}={path}" for key, path in folders.items())]


def _filled(override: str, folders: dict[str, Path]) -> str:
    for name, folder in folders.items():
        override = override.replace(f"{{{name}}}", str(folder))
    return override
