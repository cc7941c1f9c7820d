"""The adapters that are served: of a run, or of a file of JSON lines {"name": NAME, "tenant": FOLDER}."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from lowrank_cli.errors import UserError
from lowrank_cli.reader import Where, parse_json, read_text
from lowrank_cli.schema import ServeRun

Name = Annotated[str, Where(lambda name: 0 < len(name.strip()) <= 200, "a name of up to 200 characters")]


class Line(TypedDict):
    """One line of the file."""

    tenant: str  #: folder of a run or of an adapter, relative to the working directory
    name: NotRequired[Name]  #: what requests call it; by default, as :func:`default_name`


def tenants_of(config: ServeRun) -> dict[str, str]:
    """Folders by name, as :func:`read_tenants`; raises UserError also if one is named like the model."""
    settings = config.serve
    if settings.tenants is not None:
        tenants = read_tenants(Path(settings.tenants))
    elif config.run is not None:
        tenants = {settings.name or default_name(config.run): config.run}
    else:
        tenants = {}
    if config.model.name in tenants:
        raise UserError(f"serve: '{config.model.name}' is the name of the model; name the adapter otherwise")
    return tenants


def read_tenants(path: Path) -> dict[str, str]:
    """Folders by name. Raises UserError if the file cannot be read, has no lines, or names two tenants alike."""
    key, tenants = "serve.tenants", dict[str, str]()
    try:
        lines = read_text(path, "rows").split("\n")
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    for number, text in enumerate(lines, 1):
        if text.strip():
            line = parse_json(text, Line, f"{key}: {path}, line {number}")
            name = line.get("name") or default_name(line["tenant"])
            if name in tenants:
                raise UserError(f"{key}: {path}, line {number}: there is a tenant '{name}' already; give it a name")
            tenants[name] = line["tenant"]
    if not tenants:
        raise UserError(f"{key}: '{path}' has no lines")
    return tenants


def default_name(folder: str) -> str:
    """The name of a run's folder; of an adapter in it, that of the run."""
    path = Path(os.path.realpath(os.path.expanduser(folder)))
    return path.parent.name if path.name == "adapter" else path.name
