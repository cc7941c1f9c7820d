"""Transcripts: files of commands with all that they print, which are run again and compared.

A transcript is a comment, then blocks::

    $ lrk train method=milra
    2> error: method: unknown value 'milra'; …
    [2]

that is the command, its stdout, its stderr behind ``2> ``, and its exit code where that is not 0. To add a command, add
its ``$`` line and renew the file. None of the commands may write anything into its working directory, a copy of
``given/`` and ``runs/``.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from .command import Ended, call, working_directory

FOLDER = Path(__file__).parent
FILES = sorted((FOLDER / "transcripts").glob("*.txt"))


def check(file: Path, folder: Path) -> str:
    """What differs when the commands of ``file`` run in the empty ``folder``; "" where nothing does."""
    recorded, now = file.read_text(), run(file, folder)
    lines = difflib.unified_diff(
        recorded.splitlines(), now.splitlines(), f"{file.name} as recorded", "now", "", "", 3, ""
    )
    return "\n".join(lines)


def renew(file: Path, folder: Path) -> bool:
    """Record what the commands of ``file`` print now; whether that changed the file."""
    recorded, now = file.read_text(), run(file, folder)
    file.write_text(now)
    return now != recorded


def run(file: Path, folder: Path) -> str:
    """The whole text of a transcript, as its commands print it now."""
    text = file.read_text()
    shutil.copytree(FOLDER / "given", folder, dirs_exist_ok=True)
    shutil.copytree(FOLDER / "runs", folder / "runs")
    blocks = [text.partition("\n\n$ ")[0]]  # the comment
    shown: dict[str, str] = {}
    before = sorted(os.listdir(folder))
    with working_directory(folder):
        for line in re.findall(r"^\$ lrk ?(.*)", text, re.MULTILINE):
            ended = call(*shlex.split(line))
            assert sorted(os.listdir(folder)) == before, f"lrk {line} changed files"
            blocks.append(block(f"lrk {line}".rstrip(), ended, shown))
    return "\n\n".join(blocks) + "\n"


def block(command: str, ended: Ended, shown: dict[str, str]) -> str:
    """One command of a transcript. ``shown`` holds the sections of configurations above it, each with its command."""
    out = abridged(ended.out, command, shown) if "--dry-run" in command else ended.out
    lines = [f"$ {command}", *out.splitlines(), *(f"2> {line}" for line in ended.err.splitlines())]
    return "\n".join([*lines, *[f"[{ended.code}]"] * (ended.code != 0)])


def abridged(yaml: str, command: str, shown: dict[str, str]) -> str:
    """A composed configuration in which a section that stands above is one line that says where."""

    def sections() -> Iterator[str]:
        for section in re.split(r"^(?=\S)(?!- )", yaml, flags=re.MULTILINE)[1:]:
            above = shown.setdefault(section, command)
            key = section.partition("\n")[0]
            yield section if above == command or section.count("\n") == 1 else f"{key} as in {above}\n"

    return "".join(sections())
