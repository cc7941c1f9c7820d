"""``lrk new``: a commented file for a group, in which only what has no default is left to fill in."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lowrank_cli.config.folders import conf_folder, files
from lowrank_cli.errors import UserError, require_choice
from lowrank_cli.reader import read_text
from lowrank_cli.report import path_format
from lowrank_cli.runs.files import atomic_write

TEMPLATES = Path(__file__).parents[1] / "assets" / "new"
KINDS = ("task", "model", "method", "study")
OWN = "conf"  #: the folder of one's own groups, where --config-dir names no other
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def write(kind: str, name: str, config_dir: str | None) -> str:
    """Write ``<config_dir>/<kind>/<name>.yaml``; returns what to do next.

    Raises:
        UserError: there is no such kind, the name cannot be a file's, or a file of this name exists.
    """
    require_choice("new", kind, KINDS)
    if not NAME.fullmatch(name):
        raise UserError(f"new: '{name}' cannot name a {kind}; take letters, digits, _ and -")
    folder = Path(config_dir or OWN).expanduser()
    file = folder / kind / f"{name}.yaml"
    taken = file if file.exists() else files(kind).get(name)
    if taken is not None:
        raise UserError(f"new: there is a {kind} '{name}' already: {path_format.shown(taken)}; take another name")
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(
        file,
        read_text(TEMPLATES / f"{kind}.yaml", "YAML").replace("NAME:", f"{name}:", 1).replace(": NAME", f": {name}"),
    )
    ours = folder.resolve() == conf_folder()
    option = "" if ours else f" --config-dir {shlex.quote(str(folder))}"
    return f"wrote {path_format.shown(file)}; fill it in, then: lrk check {kind}={name}{option}"
