"""Install requirements into the environment of this Python, in the locked versions.

    .venv/bin/python scripts/install.py '.[4bit,triton]'     # "." is the checkout

By uv where it is on PATH, else by pip, and by pip where uv fails. uv does not read pip's settings, so they are handed
to it.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKED = ("--constraint", "constraints.txt")  #: relative to ROOT, where commands run

#: uv's options for pip's settings that hold one value or several
UV_OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}

#: Runs a command in ROOT; returns its exit code, which is negative where a signal ended it.
Run = Callable[..., int]


def install(run: Run, python: Path, *arguments: str) -> int:
    """Install ``arguments``, which pip and uv both understand, into the environment of ``python``.

    Returns the exit code of the last command that ``run`` ran.
    """
    if uv := shutil.which("uv"):
        code = run(uv, "pip", "install", "--python", python, *uv_options(python), *arguments)
        if code <= 0:  # done, or ended by a signal
            return code
        print("lrk: uv could not install the packages; trying pip", file=sys.stderr, flush=True)
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check")
    return run(*pip, "--upgrade-strategy=eager", *arguments)  # with --upgrade: of what packages need too, as uv does


def uv_options(python: Path) -> list[str]:
    """pip's settings (its files, then its variables) as options of uv, and the lock for what builds a package."""
    listed = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    by_section: dict[str, dict[str, str]] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")  # global.find-links='/one /two'
        section, _, option = key.rpartition(".")
        by_section.setdefault(section, {})[option] = ast.literal_eval(value)
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # the later one decides, as in pip
        settings |= by_section.get(section, {})

    options = ["--index-strategy", "unsafe-best-match", "--build-constraint", LOCKED[1]]  # pip looks at every index
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    for option, name in UV_OPTIONS.items():
        for value in settings.get(option, "").split():
            options += [name, value]
    return options


if __name__ == "__main__":
    os.chdir(ROOT)
    # The path as it was called: resolved, the link .venv/bin/python leads out of the environment.
    sys.exit(install(lambda *command: subprocess.call(command), Path(sys.executable), *LOCKED, *sys.argv[1:]))
