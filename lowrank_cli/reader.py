"""Reads untrusted files: limits their size and depth, and checks them against a schema.

A schema is a type: ``int``, ``float`` (accepts integers), ``str``, ``bool``, ``None``, ``list[…]``, ``dict[str, …]``,
unions of them, a ``TypedDict``, a dataclass (keys with a default may be missing), or ``Annotated[type, Where(…)]`` for
a further condition. Keys that are not in a schema may hold anything.
Errors are one line: ``FILE: KEY is VALUE; expected …``.
"""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
import stat
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml

from lowrank_cli.errors import UserError, shorten

MAX_BYTES = {"JSON": 2**28, "YAML": 2**22, "rows": 2**32}  #: of a file; rows are data sets, one row a line
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  #: endings of files that are decompressed; the limit holds for their text
MAX_DEPTH = 32  #: of nested lists and mappings
MAX_VALUES = 10_000_000  #: in a file, counting every use of a YAML alias

NOUNS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "null",
    list: "a list",
    dict: "keys with values",
}


@dataclass(frozen=True)
class Where:
    """A condition on a value of the right type, and its description in errors."""

    holds: Callable[[Any], bool]
    expected: str


Count = Annotated[int, Where(lambda value: value >= 0, "a whole number, 0 or more")]
Finite = Annotated[float, Where(lambda number: abs(number) <= sys.float_info.max, "a finite number")]
#: Name of a file or folder, without a path.
PlainName = Annotated[
    str,
    Where(
        lambda name: 0 < len(name) <= 255 and not (name.startswith(".") or set(name) & set("/\\\0")),
        "a plain name, no path",
    ),
]
Sha256 = Annotated[
    str, Where(lambda text: len(text) == 64 and not set(text) - set("0123456789abcdef"), "a SHA-256 in hex")
]


def read_json(path: Path, kind: Any = Any) -> Any:
    """A JSON file. Raises UserError if it cannot be read or is not of type ``kind``."""
    return parse_json(read_text(path, "JSON"), kind, str(path))


def parse_json(text: str | bytes, kind: Any, source: str) -> Any:
    """Parse JSON. Raises UserError, naming ``source``, unless it is of type ``kind``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} cannot be read as JSON: {_reason(error)}") from None
    return _checked(value, kind, source)


def read_json_lines(path: Path, kind: Any) -> list[Any]:
    """The lines of a JSON Lines file, each of type ``kind``, without a last one that a kill cut short."""
    lines = read_text(path, "JSON").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(parse_json(line, kind, f"{path}, line {number}"))
            except UserError:
                if number < len(lines):  # a complete line ends in a line feed
                    raise
    return rows


def read_yaml(path: Path, kind: Any = dict[str, Any]) -> Any:
    """A YAML file of plain values. Raises UserError if it cannot be read or is not of type ``kind``."""
    text = read_text(path, "YAML")
    try:
        value = copy.deepcopy(_parsed_yaml(text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read as YAML: {_reason(error)}") from None
    return _checked(value, kind, str(path))


@lru_cache(maxsize=32)
def _parsed_yaml(text: str) -> Any:
    """Its values, parsed once: a command reads the configuration of a run several times."""
    return yaml.safe_load(text)


def read_text(path: Path, what: str) -> str:
    """The text of a regular file, decompressed and without a byte order mark.

    Args:
        what: the key of its limit in :data:`MAX_BYTES`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"'{path}' cannot be read: it is not a file")
        if status.st_size > MAX_BYTES[what]:
            raise UserError(f"'{path}' cannot be read: {status.st_size} bytes (at most {MAX_BYTES[what]} of {what})")
        if path.suffix not in COMPRESSED:
            return path.read_text(encoding="utf-8-sig")
        with _decompressor(path) as file:
            data = file.read(MAX_BYTES[what] + 1)
        if len(data) > MAX_BYTES[what]:
            raise UserError(f"'{path}' cannot be read: more than {MAX_BYTES[what]} bytes of {what}, decompressed")
        return data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"'{path}' cannot be read: {_reason(error)}") from None


def _decompressor(path: Path) -> Any:
    """An open compressed file. Raises UserError if the library for its compression is not installed."""
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"'{path}' cannot be read: run pip install 'lowrank-cli[zst]'") from None
        return zstandard.open(path, "rb")
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[path.suffix](path, "rb")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _checked(value: Any, kind: Any, source: str) -> Any:
    for _ in leaves(value, source):
        pass
    check(value, kind, source)
    return value


def leaves(value: Any, source: str) -> Iterator[tuple[str, Any]]:
    """Every key and every plain value in ``value``, each with its dotted key.

    Raises:
        UserError: the nesting is too deep, there are too many values, a value is neither plain nor a list or mapping,
            or a text has lone surrogates (JSON's ``"\\ud800"``), which cannot be written again.
    """
    stack: list[tuple[str, Any, int]] = [("", value, 0)]
    count = 0
    while stack:
        key, item, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise UserError(f"{source}: {shorten(key)} is nested more than {MAX_DEPTH} levels deep")
        if count > MAX_VALUES:
            raise UserError(f"{source}: it holds more than {MAX_VALUES} values")
        if isinstance(item, dict):
            for name, below in item.items():
                _whole(name, source, f"a key of {key or 'it'}")
                yield key, name
                stack.append((_below(key, name), below, depth + 1))
        elif isinstance(item, list):
            stack += ((f"{key}[{index}]", below, depth + 1) for index, below in enumerate(item))
        elif item is None or isinstance(item, str | int | float):
            _whole(item, source, key)
            yield key, item
        else:
            raise _wrong(item, "text, a number, true, false or null", source, key)


def _whole(value: Any, source: str, key: str) -> None:
    """Raise UserError for text with lone surrogates."""
    try:
        value.encode() if isinstance(value, str) else None
    except UnicodeEncodeError:
        raise _wrong(value, "text of whole characters", source, key) from None


def check(value: Any, kind: Any, source: str, key: str = "") -> None:
    """Raise UserError unless ``value``, at ``key`` of ``source``, is of type ``kind``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin is Annotated:
        if not _is(value, kind):
            raise _wrong(value, expected(kind), source, key)
        for rule in arguments[1:]:
            if not rule.holds(value):
                raise _wrong(value, rule.expected, source, key)
        check(value, arguments[0], source, key)
    elif origin in (Union, types.UnionType):
        if not any(_is(value, option) for option in arguments):
            raise _wrong(value, expected(kind), source, key)
        for option in arguments:
            if _is(value, option):
                return check(value, option, source, key)
    elif not _is(value, kind):
        raise _wrong(value, expected(kind), source, key)
    elif is_typeddict(kind) or is_dataclass(kind):
        for name, (hint, required) in _keys(kind).items():
            if name in value:
                check(value[name], hint, source, _below(key, name))
            elif required:
                raise UserError(f"{source}: {_below(key, name)} is missing; expected {expected(hint)}")
    elif origin is dict:
        for name, item in value.items():
            check(name, arguments[0], source, f"a key of {key or 'it'}")
            check(item, arguments[1], source, _below(key, name))
    elif origin is list:
        for index, item in enumerate(value):
            check(item, arguments[0], source, f"{key}[{index}]")


def _is(value: Any, kind: Any) -> bool:
    """Whether the outermost type of ``value`` fits."""
    if get_origin(kind) is Annotated:
        return _is(value, get_args(kind)[0])
    if is_typeddict(kind) or is_dataclass(kind):
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, get_origin(kind) or kind)


@cache
def _keys(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The keys of a TypedDict or a dataclass: their types, and whether they are required."""
    hints = get_type_hints(kind, include_extras=True)
    if is_dataclass(kind):
        defaults = ((item.name, (item.default, item.default_factory)) for item in fields(kind))
        return {name: (hints[name], both == (MISSING, MISSING)) for name, both in defaults}
    return {
        name: (get_args(hint)[0], False) if get_origin(hint) is NotRequired else (hint, kind.__total__)
        for name, hint in hints.items()
    }


def expected(kind: Any) -> str:
    """A description of the type ``kind``."""
    if get_origin(kind) is Annotated:
        return get_args(kind)[1].expected
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(expected(option) for option in get_args(kind))
    return NOUNS.get(get_origin(kind) or kind, NOUNS[dict])


def _below(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _wrong(value: Any, wanted: str, source: str, key: str) -> UserError:
    return UserError(f"{source}: {shorten(key) or 'it'} is {shown(value)}; expected {wanted}")


def shown(value: Any) -> str:
    """A value as JSON, shortened if it is long."""
    if isinstance(value, dict | list):
        return f"{NOUNS[type(value)]} ({len(value)})" if value else "[]" if isinstance(value, list) else "{}"
    return shorten(json.dumps(value, ensure_ascii=False) if value is None or isinstance(value, bool) else repr(value))
