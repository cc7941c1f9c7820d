"""What a trial is, and when a command did right."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from .command import Ended

#: Control characters that a terminal acts on, bidirectional overrides among them; tabs and line ends are none.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LONGEST = 1500  #: characters of an error line, paths and lists of what is allowed included


class Failed(Exception):
    """A command did what it must not."""


class Skipped(Exception):
    """The trial cannot be made here; the message says why."""


@dataclass
class Result:
    """One trial and how it ended."""

    family: str
    seed: int
    status: str  #: ``passed``, ``failed`` or ``skipped``
    what: str  #: the case that the seed drew
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, float] | None = None  #: measured by the trial, such as the time to stop

    @property
    def again(self) -> str:
        """The command that repeats it."""
        return f"python -m tests.reliability {self.family} --seed {self.seed}"


def judge(ended: Ended, *, names: Collection[str] = (), codes: Collection[int] = (0, 1, 2)) -> None:
    """Raise :class:`Failed` unless ``ended`` is one of ``codes``, and an error one line that holds one of ``names``."""
    if ended.reports:
        raise Failed(ended.reports[0])
    if ended.code is None:
        raise Failed(f"did not end within {ended.seconds:.0f} s")
    raised = traceback_of(ended.err) or traceback_of(ended.out)
    if raised:
        raise Failed(raised)
    if ended.code not in codes:
        raise Failed(f"exit code {ended.code}, not {' or '.join(map(str, codes))}: {_end(ended.err)}")
    for name, text in (("stdout", ended.out), ("stderr", ended.err)):
        text = text.replace("\r", "\n")
        if control := CONTROL.search(text):
            at = control.start()
            raise Failed(f"{name} holds {control[0]!r} raw: {text[max(0, at - 60) : at + 20]!r}")
    if ended.code in (1, 2):
        errors = [line for line in ended.err.split("\n") if line.startswith("error: ")]
        if len(errors) != 1 or not ended.err.rstrip("\n").endswith(errors[0]):
            raise Failed(f"exit code {ended.code} and {len(errors)} error lines, where one at the end is wanted")
        if len(errors[0]) > LONGEST:
            raise Failed(f"an error line of {len(errors[0])} characters: {errors[0][:80]}…")
        if names and not any(name in errors[0] for name in names):
            raise Failed(f"the error names none of {', '.join(names)}: {errors[0]}")


def traceback_of(text: str) -> str | None:
    """The exception at the end of the last traceback in ``text``, and where in the package it came from."""
    if "Traceback (most recent call last)" not in text:
        return None
    last = text.rpartition("Traceback (most recent call last)")[2]
    own = re.findall(r'File ".*?/(lowrank_cli/[^"]+)", line (\d+)', last)
    ends = [line for line in last.split("\n")[1:] if re.match(r"[A-Za-z_][\w.]*(:|$)", line)]
    where = f" at {own[-1][0]}:{own[-1][1]}" if own else ""
    return f"traceback: {(ends or ['?'])[0][:200]}{where}"


def _end(text: str) -> str:
    return text.strip().rpartition("\n")[2][:200] or "nothing on stderr"
