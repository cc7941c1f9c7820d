"""Where configuration files lie, and what their first line says. Light: help and lists need no Hydra."""

from __future__ import annotations

from pathlib import Path

from lowrank_cli import runs
from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_text

GROUPS = ("model", "task", "hardware", "method")


def groups_of(verb: str) -> tuple[str, ...]:
    """The groups of a verb's configuration."""
    return {"run": ("recipe",), "study": ("study",), "bench": ("bench", "model", "task", "hardware")}.get(verb, GROUPS)


def conf_folder() -> Path:
    """The checkout's ``conf/`` where this package lies in a checkout, else the copy in the wheel."""
    if (runs.ROOT / "conf").is_dir() and (runs.ROOT / "pyproject.toml").is_file():
        return runs.ROOT / "conf"
    return runs.ROOT / "lowrank_cli" / "conf"


def conf_folders(config_dir: str | None) -> list[Path]:
    """Where groups are looked up, first match wins."""
    if config_dir is None:
        return [conf_folder()]
    folder = Path(config_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"--config-dir: there is no folder '{config_dir}'")
    return [folder.resolve(), conf_folder()]


def files(group: str, config_dir: str | None = None) -> dict[str, Path]:
    """The choices of a group, sorted, each with its file; not those that others are made from, such as ``_base``."""
    found: dict[str, Path] = {}
    for folder in reversed(conf_folders(config_dir)):
        for path in (folder / group).rglob("[!_]*.yaml"):
            found[path.relative_to(folder / group).with_suffix("").as_posix()] = path
    return dict(sorted(found.items()))


def description(path: Path) -> str:
    """The first comment line of a configuration file, or why it cannot be read: a broken one hides no other."""
    try:
        first = read_text(path, "YAML").partition("\n")[0]
    except UserError as error:
        return str(error)
    return first.removeprefix("#").strip() if first.startswith("#") else ""
