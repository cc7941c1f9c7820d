"""Finds configuration files and their one-line descriptions, without importing Hydra."""

from __future__ import annotations

from pathlib import Path

from lowrank_cli import runs
from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_text

GROUPS = ("model", "task", "hardware", "method")


def groups_of(verb: str) -> tuple[str, ...]:
    """The groups of a verb's configuration."""
    others = {
        "run": ("recipe",),
        "study": ("study",),
        "bench": ("bench", "model", "task", "hardware"),
        "evaluate": (*GROUPS, "eval"),
    }
    return others.get(verb, GROUPS)


def conf_folder() -> Path:
    """The checkout's ``conf/`` if this package is in a checkout, else the copy in the wheel."""
    if (runs.ROOT / "conf").is_dir() and (runs.ROOT / "pyproject.toml").is_file():
        return runs.ROOT / "conf"
    return runs.ROOT / "lowrank_cli" / "conf"


def conf_folders(config_dir: str | None) -> list[Path]:
    """The folders in which groups are looked up, in order. Raises UserError if ``config_dir`` is missing."""
    if config_dir is None:
        return [conf_folder()]
    folder = Path(config_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"--config-dir: there is no folder '{config_dir}'")
    return [folder.resolve(), conf_folder()]


def files(group: str, config_dir: str | None = None) -> dict[str, Path]:
    """The choices of a group, sorted, each with its file; without files that only others inherit, such as ``_base``."""
    choices: dict[str, Path] = {}
    for folder in reversed(conf_folders(config_dir)):
        for path in (folder / group).rglob("[!_]*.yaml"):
            choices[path.relative_to(folder / group).with_suffix("").as_posix()] = path
    return dict(sorted(choices.items()))


def description(path: Path) -> str:
    """The first comment line of a configuration file, or why it cannot be read, so that lists still show the others."""
    try:
        first = read_text(path, "YAML").partition("\n")[0]
    except UserError as error:
        return str(error)
    return first.removeprefix("#").strip() if first.startswith("#") else ""
