"""The keys of the schemas and their meaning (``#:`` comments), with the values of configuration files."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, cast, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lowrank_cli import methods
from lowrank_cli.config.folders import conf_folders, files
from lowrank_cli.errors import UserError, require_choice, unknown
from lowrank_cli.reader import read_text
from lowrank_cli.schema import BENCHES, KINDS, VERBS, BenchConfig, StudyConfig, TuneConfig

Row = tuple[str, str, str]  #: key, value and meaning
#: Keys whose choices are explained one by one, by level.
EXPLAINED = {"score.kind": KINDS}


def method_keys(choice: str, config_dir: str | None) -> list[Row]:
    """Each setting in the file of ``method=choice``, in the file's order."""
    choices = files("method", config_dir)
    if choice not in choices:
        raise unknown("list methods", choice, choices)
    values = _read(choices[choice])
    require_choice(f"{choices[choice]}: name", values.get("name"), methods.names())
    return _rows("method", methods.config_classes()[values["name"]], values)


def section_keys(section: str, config_dir: str | None) -> list[Row]:
    """Each setting of a section, with its value in the verb's file, or in the group's file that the verb's file names.

    Args:
        section: a section, or ``bench=NAME`` for one of the kinds of ``lrk bench``.
    """
    section, _, kind_of_bench = section.partition("=")
    verb = verbs_of(section)[0]
    if verb == "study":  # it has no defaults in conf/: every study sets its own values
        return [
            *_rows("study", StudyConfig, _defaults(StudyConfig)),
            *_rows("study.tune", TuneConfig, _defaults(TuneConfig)),
        ]
    paths = files("", config_dir)
    primary = _read(paths[verb])
    listed = [item for item in primary.get("defaults", ()) if isinstance(item, dict)]
    choices = {group: name for item in listed for group, name in item.items()}
    if section == "bench" and kind_of_bench:
        choices["bench"] = kind_of_bench
    if section in choices and choices[section] is None:
        choices[section] = next(iter(files(section, config_dir)))  # chosen by the user alone
    if section in primary:
        given = primary[section]
    else:
        where = f"list keys {section}" if kind_of_bench else f"{paths[verb]}: defaults: {section}"
        require_choice(where, choices.get(section), files(section, config_dir))
        given = _inherited(section, paths[f"{section}/{choices[section]}"], config_dir)
    kind = sections(verb)[section]
    if kind is BenchConfig:
        require_choice(f"{paths[f'bench/{choices[section]}']}: measure", given.get("measure"), BENCHES)
        kind = BENCHES[given["measure"]]
    return _rows(section, kind, _defaults(kind) | given)


def _defaults(kind: Any) -> dict[str, Any]:
    return {
        item.name: item.default if item.default_factory is MISSING else item.default_factory() for item in fields(kind)
    }


def sections(verb: str) -> dict[str, Any]:
    """The sections of a verb's configuration with their schemas, except the method's."""
    hints = {name: _present(hint) for name, hint in get_type_hints(VERBS[verb]).items()}
    return {name: kind for name, kind in hints.items() if is_dataclass(kind)}


def _present(hint: Any) -> Any:
    """What an optional section is if it is not null."""
    inner = [kind for kind in get_args(hint) if kind is not NoneType]
    return inner[0] if len(inner) == 1 and is_dataclass(inner[0]) else hint


def verbs_of(section: str) -> list[str]:
    """The verbs that have a section, the one of the same name first. Raises UserError if none has it."""
    sections_of = {verb: sections(verb) for verb in VERBS if verb != "run"}
    verbs = [verb for verb, names in sections_of.items() if section in names]
    if not verbs:
        raise unknown("list keys", section, dict.fromkeys(name for names in sections_of.values() for name in names))
    return sorted(verbs, key=lambda verb: verb != section)


def _read(path: Path) -> dict[str, Any]:
    """The values of one configuration file alone. Raises UserError if it cannot be read or is not a mapping."""
    try:
        values = OmegaConf.to_container(OmegaConf.create(read_text(path, "YAML")))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a configuration; expected keys with values")
    return cast(dict[str, Any], values)


def _inherited(group: str, path: Path, config_dir: str | None) -> dict[str, Any]:
    """The values of a group's file, merged over those of the files in its defaults list."""
    values = _read(path)
    merged: dict[str, Any] = {}
    for name in values.get("defaults", ()):
        candidates = [folder / group / f"{name}.yaml" for folder in conf_folders(config_dir)]
        if base := next((file for file in candidates if file.is_file()), None):
            merged |= _inherited(group, base, config_dir)
    return merged | values


def _rows(section: str, kind: type, values: dict[str, Any]) -> list[Row]:
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        meanings |= comments(base)
    rows = []
    for name in (name for name in values if name not in ("defaults", "name")):
        key = f"{section}.{name}"
        rows.append((key, json.dumps(values[name]).replace('"', "").replace("???", ""), meanings.get(name, "")))
        for level, choices in EXPLAINED.get(key, {}).items():
            rows += [("", f"{choice} ({level})", text) for choice, text in choices.items()]
    return rows


def knows(kind: Any, key: str) -> bool:
    """Whether a schema has a dotted key; in a section without a schema every key is taken for known."""
    name, _, rest = key.partition(".")
    section = _present(get_type_hints(kind).get(name))
    return section is not None and (not rest or not is_dataclass(section) or knows(section, rest))


def flat(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema; none if ``kind`` is not one."""
    hints = get_type_hints(kind) if is_dataclass(kind) else {}
    for item in fields(kind) if hints else ():
        yield f"{prefix}{item.name}"
        yield from flat(hints[item.name], f"{prefix}{item.name}.")


def comments(schema: type) -> dict[str, str]:
    """Field → its ``#:`` comment, from the lines above the field or the end of its line, without markup."""
    texts: dict[str, list[str]] = {}
    above: list[str] = []
    field = ""
    for line in inspect.getsource(schema).splitlines():
        code, _, comment = line.partition("#:")
        text = [re.sub(r":\w+:`(.*?)`", r"\1", comment.strip().replace("``", ""))] if comment else []
        if named := re.match(r" {4}(\w+): ", code):
            field = named[1]
            texts[field], above = above + text, []
        elif code.strip():
            texts.setdefault(field, []).extend(text)
        else:
            above += text
    return {name: " ".join(lines) for name, lines in texts.items() if lines}
