"""``lrk`` in this process, with the machine taken out of what it prints."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from lowrank_cli import cli

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = "120"
#: What differs between machines, installations and days, and what is printed in its place.
MACHINE = (
    (re.compile(r"warning: untested versions: .*\n"), ""),
    (re.compile(r"/[^\s\"']*(?=/lowrank_cli/assets/)"), "ROOT"),  # of the checkout that wrote an adapter
    (re.compile(r"\b\d{4}-\d\d-\d\d/"), "DATE/"),
    (re.compile(r"(?<=DATE/)\d{6}(?=-)|(?<=  )\d{6}(?=-)"), "TIME"),
    (re.compile(r"\b[\d.]+ ?(s|ms|min|MiB|GiB|GFLOP/s)\b"), r"N \1"),
)


@dataclass
class Ended:
    code: int
    out: str
    err: str


def call(*arguments: str) -> Ended:
    """``lrk ARGUMENTS`` in the working directory."""
    out, err = io.StringIO(), io.StringIO()
    environment = mock.patch.dict(os.environ, COLUMNS=COLUMNS)
    with environment, mock.patch.object(sys, "argv", ["lrk", *arguments]), redirect_stdout(out), redirect_stderr(err):
        code = cli.call(list(arguments))
    return Ended(code, normalised(out.getvalue()), normalised(err.getvalue()))


def normalised(text: str) -> str:
    """``text`` with the working directory as ``HERE``, the checkout as ``ROOT``, and no dates and times."""
    for folder, name in ((os.getcwd(), "HERE"), (str(ROOT), "ROOT")):
        text = text.replace(folder, name)
    for pattern, neutral in MACHINE:
        text = pattern.sub(neutral, text)
    return text


@contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
