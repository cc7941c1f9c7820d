"""One family of errors: each says in one line which key, which value, what is allowed and the nearest match."""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

#: What a terminal would act on, or what changes the order of letters: control characters but for tab and line feed,
#: marks of direction, and halves of characters.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """``text`` from outside as it can be printed: a terminal shows its control characters and acts on none."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def shorten(text: str, length: int = 80) -> str:
    """``text``, its middle left out where it has more than ``length`` characters."""
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 4 :]} ({len(text)} characters)"


class LrkError(Exception):
    """Base of every error that a person reads as one line; ``exit_code`` is the process's."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(escaped(cut(" ".join(str(message).split()))))


class UserError(LrkError):
    """The input is wrong: nothing was written, exit code 2."""

    exit_code = 2


class WorkFailed(LrkError):
    """The input was right but the work could not be finished: exit code 1."""


class Interrupted(LrkError):
    """A signal ended the work; the message says how to go on. ``exit_code`` is what shells report for the signal."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


#: What a machine refuses, whoever asks: full, read-only, broken and closed files, permissions, quotas, limits.
_REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EPIPE,
    errno.EBADF,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.ENAMETOOLONG,
}


def refusal(error: BaseException) -> str | None:
    """What the machine refused, such as ``No space left on device: 'FILE'``; None for any other error."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return os.strerror(error.errno) + (f": '{error.filename}'" if error.filename else "")
    number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers are written in Rust
    return os.strerror(int(number[1])) if number and int(number[1]) in _REFUSALS else None


LONGEST = 300  #: characters of a value that a message shows whole


def cut(message: str) -> str:
    """``message`` with the middle of each long value, in quotes or a single word, left out."""

    def ends(match: re.Match[str]) -> str:
        quote, value = ("'", match[1]) if match[1] else ("", match[0])
        return f"{quote}{value[:60]}…{value[-20:]}{quote}"

    return re.sub(rf"'([^']{{{LONGEST},}})'|\S{{{LONGEST},}}", ends, message)


@contextmanager
def inside(key: str, full: str) -> Iterator[None]:
    """Errors of the block that name ``key``, or a key below it, name ``full`` in its place."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(rf"^{re.escape(key)}(?=[.:])", lambda _: full, str(error))) from error


def nearest(value: object, allowed: Iterable[object]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``allowed``, else the first that ``value`` is a part of; or empty.

    Never the opposite: of ``imbalanced`` only the end is like ``ballanced``.
    """
    word, names = str(value), [str(item) for item in allowed]
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    match = [name for name in close if _alike(word, re.sub(r"^(im|in|un|dis)", "", name)) <= _alike(word, name)]
    match += [name for name in names if len(word) > 2 and word in name]
    return f"; did you mean '{match[0]}'?" if match else ""


def _alike(word: str, name: str) -> float:
    return difflib.SequenceMatcher(None, name, word).ratio()


def unknown(key: str, value: object, allowed: Iterable[object]) -> UserError:
    """The error for a value outside a closed set."""
    names = [str(item) for item in allowed]
    return UserError(f"{key}: unknown value '{value}'{nearest(value, names)} (allowed: {', '.join(names) or 'none'})")


def require_choice(key: str, value: object, allowed: Iterable[object]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    allowed = list(allowed)
    if value not in allowed:
        raise unknown(key, value, allowed)


def require_range(key: str, value: float, low: float | None = None, high: float | None = None) -> None:
    """Raise unless ``low <= value <= high`` (either bound may be absent); NaN and infinity are outside every range."""
    if (low is None or value >= low) and (high is None or value <= high) and math.isfinite(value):
        return
    allowed = (
        f"{low} to {high}" if None not in (low, high) else f"at least {low}" if high is None else f"at most {high}"
    )
    if not math.isfinite(value):
        allowed = f"a finite number, {allowed}"
    raise UserError(f"{key}: {value} is out of range (allowed: {allowed})")
