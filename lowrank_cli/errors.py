"""Errors that users see. Each is one line: the key, its value, what is allowed and the nearest match."""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

#: Characters that a terminal acts on or that reorder text: control characters except tab and line feed, direction
#: marks, and lone surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """``text`` with control characters escaped, so that it is safe to print."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def shorten(text: str, length: int = 80) -> str:
    """``text`` without its middle if it is longer than ``length`` characters."""
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 4 :]} ({len(text)} characters)"


class LrkError(Exception):
    """Base of the errors that are shown to users as one line; ``exit_code`` is the exit code of the process."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(escaped(cut(" ".join(str(message).split()))))


class UserError(LrkError):
    """The input is wrong: nothing was written, exit code 2."""

    exit_code = 2


class WorkFailed(LrkError):
    """The input was valid but the work failed: exit code 1."""


class Diverged(WorkFailed):
    """The loss or the weights became infinite or not a number: the same settings would fail again."""


class Interrupted(LrkError):
    """A signal stopped the work; the message says how to resume. ``exit_code`` is that of shells for the signal."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


#: Errors of the machine, not bugs: disk full, read-only, broken or closed files, permissions, quotas, limits.
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
    """The machine's error, such as ``No space left on device: 'FILE'``; None for any other error."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return os.strerror(error.errno) + (f": '{error.filename}'" if error.filename else "")
    number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers are written in Rust
    return os.strerror(int(number[1])) if number and int(number[1]) in _REFUSALS else None


LONGEST = 300  #: characters in a value that a message shows in full


def cut(message: str) -> str:
    """``message`` with long values (quoted texts or single words) shortened."""

    def ends(match: re.Match[str]) -> str:
        quote, value = ("'", match[1]) if match[1] else ("", match[0])
        return f"{quote}{value[:60]}…{value[-20:]}{quote}"

    return re.sub(rf"'([^']{{{LONGEST},}})'|\S{{{LONGEST},}}", ends, message)


@contextmanager
def inside(key: str, full: str) -> Iterator[None]:
    """Inside, UserErrors that begin with ``key``, or a key in it, begin with ``full`` instead."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(rf"^{re.escape(key)}(?=[.:])", lambda _: full, str(error))) from error


@contextmanager
def writing(key: str, path: object) -> Iterator[None]:
    """Inside, an error that says where ``path`` cannot be written is a UserError that names ``key``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
            raise
        raise UserError(f"{key}: '{path}' cannot be written ({os.strerror(error.errno)})") from error


def nearest(value: object, allowed: Iterable[object]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``allowed``, else the first that contains ``value``; or empty.

    Never suggests an opposite, such as ``imbalanced`` for ``ballanced``.
    """
    word, names = str(value), [str(item) for item in allowed]
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    match = [name for name in close if _alike(word, re.sub(r"^(im|in|un|dis)", "", name)) <= _alike(word, name)]
    match += [name for name in names if len(word) > 2 and word in name]
    return f"; did you mean '{match[0]}'?" if match else ""


def _alike(word: str, name: str) -> float:
    return difflib.SequenceMatcher(None, name, word).ratio()


def unknown(key: str, value: object, allowed: Iterable[object]) -> UserError:
    """The error for a value that is not one of ``allowed``."""
    names = [str(item) for item in allowed]
    return UserError(f"{key}: unknown value '{value}'{nearest(value, names)} (allowed: {', '.join(names) or 'none'})")


def require_choice(key: str, value: object, allowed: Iterable[object]) -> None:
    """Raise UserError unless ``value`` is one of ``allowed``."""
    allowed = list(allowed)
    if value not in allowed:
        raise unknown(key, value, allowed)


def require_range(key: str, value: float, low: float | None = None, high: float | None = None) -> None:
    """Raise UserError unless ``value`` is finite and ``low <= value <= high`` (either bound may be None)."""
    if (low is None or value >= low) and (high is None or value <= high) and math.isfinite(value):
        return
    allowed = (
        f"{low} to {high}" if None not in (low, high) else f"at least {low}" if high is None else f"at most {high}"
    )
    if not math.isfinite(value):
        allowed = f"a finite number, {allowed}"
    raise UserError(f"{key}: {value} is out of range (allowed: {allowed})")
