"""Checks of the regular expressions in task configs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from lowrank_cli.errors import UserError

REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)


def require_pattern(key: str, pattern: str) -> None:
    """Raise UserError unless ``pattern`` is a regular expression that is safe to search with.

    Nested repeats such as ``(a+)+`` are refused: they can take time exponential in the length of the text.
    """
    try:
        re.compile(pattern)
        nested = _nested(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{key}: {pattern} is not a regular expression: {error}") from error
    if nested:
        raise UserError(f"{key}: {pattern} has nested repeats, which may never end; write it without")


def _nested(parsed: Any, repeated: bool = False) -> bool:
    for operation, argument in parsed:
        repeats = operation in REPEATS and argument[1] > 1
        if (repeats and repeated) or any(_nested(inner, repeated or repeats) for inner in _subpatterns(argument)):
            return True
    return False


def _subpatterns(argument: Any) -> Iterator[Any]:
    """The parsed expressions inside an argument of a parsed operation."""
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _subpatterns(item)
