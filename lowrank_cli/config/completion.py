"""Shell completion of overrides, from the YAML files alone: composing with Hydra takes longer than a shell waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lowrank_cli.config.folders import conf_folders, files, groups_of
from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_yaml

Values = dict[str, Any]


def completions(verb: str, words: list[str], incomplete: str, config_dir: str | None = None) -> list[str]:
    """Completions of ``incomplete`` after ``words``: groups, choices, keys and current values.

    A single ``key=`` or ``section.`` comes with its own completions, so that shells add no space after it.
    """
    try:
        groups = groups_of(verb)
        pairs = [word.partition("=") for word in words]
        if not all(equals for _, equals, _ in pairs):
            return []
        chosen = {
            key: value
            for key, _, value in pairs
            if key in groups and (key != "model" or "/" not in value or value in files(key, config_dir))  # else weights
        }
        key, equals, start = incomplete.partition("=")
        if equals and key in groups:
            return [f"{key}={name}" for name in files(key, config_dir) if name.startswith(start)]
        values = _composed(verb, chosen, conf_folders(config_dir))
    except UserError:  # a mistake elsewhere on the line
        return []
    if equals:
        return _value(values, key, start)
    names = {f"{group}=" for group in groups} if "." not in key else set()
    matches = sorted(name for name in names | _keys(values, key) if name.startswith(key))
    if len(matches) == 1 and matches[0].endswith("="):
        group = matches[0][:-1]
        matches += [f"{group}={name}" for name in files(group, config_dir)] if group in groups else []
        matches += [] if group in groups else _value(values, group, "")
    elif len(matches) == 1:
        matches += sorted(_keys(values, matches[0]))
    return matches


def _keys(values: Values, key: str) -> set[str]:
    """The keys next to ``key``, as ``name=``, and the sections, as ``name.``."""
    section, dot, _ = key.rpartition(".")
    inside = _at(values, section) if dot else values
    if not isinstance(inside, dict):
        return set()
    return {f"{section}{dot}{name}{'.' if isinstance(value, dict) else '='}" for name, value in inside.items()}


def _value(values: Values, key: str, start: str) -> list[str]:
    """``key`` with its current value, if that begins with ``start``."""
    value = _at(values, key)
    if value is None or isinstance(value, dict):
        return []
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
    return [f"{key}={text}"] if text.startswith(start) else []


def _at(values: Values, key: str) -> Any:
    inside: Any = values
    for name in key.split("."):
        inside = inside.get(name) if isinstance(inside, dict) else None
    return inside


def _composed(verb: str, chosen: dict[str, str], folders: list[Path]) -> Values:
    """The values of a verb's primary configuration with its groups, as chosen or as it chooses them."""
    primary = _read(verb, folders)
    values: Values = {}
    for item in primary.pop("defaults", []):
        for group, choice in (item if isinstance(item, dict) else {}).items():
            choice = chosen.get(group, choice)
            if choice not in (None, "???", "null"):
                values[group] = _inherited(group, choice, folders)
    return values | primary


def _inherited(group: str, choice: str, folders: list[Path]) -> Values:
    """The values of a group's file, over those of the files that it inherits."""
    own = _read(f"{group}/{choice}", folders)
    values: Values = {}
    bases = own.pop("defaults", [])
    for base in bases if isinstance(bases, list) else ():
        if isinstance(base, str) and base != "_self_" and any((f / f"{group}/{base}.yaml").is_file() for f in folders):
            values |= _inherited(group, base, folders)
    return values | own


def _read(name: str, folders: list[Path]) -> Values:
    """A file of the first folder that has it. Raises UserError if none has."""
    for folder in folders:
        if (file := folder / f"{name}.yaml").is_file():
            values: Values = read_yaml(file)
            return values
    raise UserError(f"there is no file {name}.yaml")
