"""The folder of a new run."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from lowrank_cli.errors import UserError


def new_folder(outputs: str | os.PathLike[str], label: str) -> Path:
    """Make ``outputs/<date>/<time>-<label>``, unique even within a second, and point ``outputs/latest`` at it."""
    outputs, now = Path(outputs), datetime.now()
    label = re.sub(r"[^\w.+-]+", "-", label).strip("-.")
    stem = outputs / now.strftime("%Y-%m-%d") / f"{now.strftime('%H%M%S')}-{label}"
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        path, number = stem, 1
        while True:
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
                path = stem.with_name(f"{stem.name}-{number}")
        point(outputs / "latest", path.relative_to(outputs))
    except OSError as error:
        raise UserError(f"outputs: cannot write to '{outputs}': {error.strerror or error}") from None
    return path


def discard(path: Path, outputs: str | os.PathLike[str]) -> None:
    """Remove a folder that :func:`new_folder` made, because the input turned out to be wrong."""
    outputs = Path(outputs)
    shutil.rmtree(path, ignore_errors=True)
    link = outputs / "latest"
    if link.is_symlink() and not link.exists():
        link.unlink()
        left = sorted(outputs.glob("*/*/"))
        if left:
            point(link, left[-1].relative_to(outputs))
    with suppress(OSError):  # not empty: another run is there
        path.parent.rmdir()
        outputs.rmdir()


def settled(path: str | os.PathLike[str]) -> Path:
    """``path`` with a ``latest`` link in it resolved, as the link changes when the next run starts."""
    path = Path(path)
    for link in (path, *path.parents):
        if link.name == "latest" and os.path.islink(link):  # False, not an error, for an invalid path
            return link.parent / link.readlink() / path.relative_to(link)
    return path


def point(link: Path, target: Path) -> None:
    """Point ``link`` at ``target``, a path relative to the link's folder."""
    if link.exists() and not link.is_symlink():
        return  # the user's own folder of that name
    temporary = link.with_name(f".latest-{os.getpid()}-{target.name}")
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, link)
