"""A file of prompts for many adapters: JSON lines {"tenant": FOLDER, "prompt": TEXT}."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_cli.errors import UserError
from lowrank_cli.reader import parse_json, read_text


@dataclass
class Request:
    """One line of the file, or the error in it."""

    fields: dict[str, Any]  #: as given: ``tenant``, ``prompt`` and any others, which are returned with the answer
    line: int = 1  #: in the file
    error: str | None = None

    @property
    def tenant(self) -> str | None:
        """Folder of a run or of an adapter, relative to the working directory; None is the bare model."""
        return self.fields.get("tenant")

    @property
    def prompt(self) -> str:
        return str(self.fields["prompt"])


def read_requests(path: Path) -> list[Request]:
    """The non-empty lines of a file. Raises UserError if it cannot be read, or has none."""
    try:
        lines = read_text(path, "rows").split("\n")  # splitlines() would split at other separators too
    except UserError as error:
        raise UserError(f"generate.tenants: {error}") from None
    requests = [_request(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise UserError(f"generate.tenants: '{path}' has no lines")
    return requests


def _request(number: int, line: str) -> Request:
    try:
        fields = parse_json(line, Any, "it")
    except UserError as error:
        return Request({"line": number}, number, str(error))
    if not isinstance(fields, dict):
        return Request({"line": number}, number, 'not an object {"tenant": FOLDER, "prompt": TEXT}')
    for key in ("tenant", "prompt"):
        if key not in fields:
            return Request(fields, number, f"'{key}' is missing{_hint(key, fields)}")
    if not isinstance(fields["prompt"], str):
        return Request(fields, number, "'prompt' is not text")
    if not isinstance(fields["tenant"], str | None):
        return Request(fields, number, "'tenant' is not a folder (null is the bare model)")
    return Request(fields, number)


def _hint(key: str, fields: dict[str, Any]) -> str:
    """Names the key that was probably meant to be ``key``."""
    close = difflib.get_close_matches(key, fields, n=1, cutoff=0.7)
    return f", and '{close[0]}' means nothing" if close else " (null is the bare model)" * (key == "tenant")
