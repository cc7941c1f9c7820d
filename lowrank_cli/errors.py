"""One family of errors: each says in one line which key, which value, what is allowed and the nearest match."""

from __future__ import annotations

import difflib
import math
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
        super().__init__(escaped(" ".join(str(message).split())))


class UserError(LrkError):
    """The input is wrong: nothing was written, exit code 2."""

    exit_code = 2


class WorkFailed(LrkError):
    """The input was right but the work could not be finished: exit code 1."""


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
    allowed = [str(item) for item in allowed]
    return UserError(
        f"{key}: unknown value '{value}'{nearest(value, allowed)} (allowed: {', '.join(allowed) or 'none'})"
    )


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
