"""Atomic writes: a kill never leaves a file half written."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace a file so that readers see either the old content or the new, even after a kill."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, temporary):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error  # the name that the user knows
        raise


@contextmanager
def atomic_folder(final: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that replaces ``final`` if the block succeeds, and is removed if it fails."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}-"))
    os.chmod(temporary, 0o777 & ~_umask())
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        with suppress(FileNotFoundError):
            os.replace(final, old)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed calls of :func:`atomic_write` and :func:`atomic_folder` left in ``folder``.

    An old folder that was moved aside but not yet replaced is moved back. No other process may write there meanwhile.
    """
    for path in sorted(folder.rglob(".*"), reverse=True):  # .NAME-x.old before .NAME-x
        match = re.fullmatch(r"\.(.+)-[a-z0-9_]{8}(\.old)?", path.name)
        if match is None:
            continue
        if match[2] and not path.with_name(match[1]).exists():
            os.replace(path, path.with_name(match[1]))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
