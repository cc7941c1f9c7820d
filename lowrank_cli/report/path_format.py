"""How paths are shown: relative to this directory, and quoted where they are part of a command."""

from __future__ import annotations

import os
import shlex


def shown(path: str | os.PathLike[str]) -> str:
    """A path as a person at this directory would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def typed(path: str | os.PathLike[str]) -> str:
    """:func:`shown`, quoted where a shell needs it."""
    return shlex.quote(shown(path))
