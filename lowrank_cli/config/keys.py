"""The keys that schemas hold, and what they mean: their ``#:`` comments, beside the values of a file."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from lowrank_cli import methods
from lowrank_cli.config.folders import files
from lowrank_cli.errors import unknown


def method_keys(choice: str, config_dir: str | None) -> list[tuple[str, str, str]]:
    """Key, value and meaning of each setting in the file of ``method=choice``, in the file's order."""
    found = files("method", config_dir)
    if choice not in found:
        raise unknown("list methods", choice, found)
    values = OmegaConf.to_container(OmegaConf.load(found[choice]))
    assert isinstance(values, dict)
    meanings: dict[str, str] = {}
    for part in reversed(methods.config_classes()[values["name"]].__mro__[:-1]):
        meanings |= comments(part)
    shown = {key: value for key, value in values.items() if key not in ("defaults", "name")}
    return [(key, json.dumps(value).replace('"', ""), meanings.get(key, "")) for key, value in shown.items()]


def knows(kind: Any, key: str) -> bool:
    """Whether a schema holds a dotted key; what a section without a schema holds is left to composing."""
    name, _, rest = key.partition(".")
    section = get_type_hints(kind).get(name)
    return section is not None and (not rest or not is_dataclass(section) or knows(section, rest))


def flat(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema; none of what is no schema."""
    hints = get_type_hints(kind) if is_dataclass(kind) else {}
    for item in fields(kind) if hints else ():
        yield f"{prefix}{item.name}"
        yield from flat(hints[item.name], f"{prefix}{item.name}.")


def comments(schema: type) -> dict[str, str]:
    """Field → its ``#:`` comment, in the lines above it or at the end of its own, without the markup."""
    found: dict[str, list[str]] = {}
    above: list[str] = []
    field = ""
    for line in inspect.getsource(schema).splitlines():
        code, _, comment = line.partition("#:")
        text = [comment.strip().replace("``", "")] if comment else []
        if named := re.match(r" {4}(\w+): ", code):
            field = named[1]
            found[field], above = above + text, []
        elif code.strip():
            found.setdefault(field, []).extend(text)
        else:
            above += text
    return {name: " ".join(lines) for name, lines in found.items() if lines}
