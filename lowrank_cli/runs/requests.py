"""A file of prompts for many adapters: JSON lines {"tenant": FOLDER, "prompt": TEXT}."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_cli.errors import UserError


@dataclass
class Request:
    """One line: what it says, or why it cannot be read."""

    fields: dict[str, Any]  #: as given; beside ``tenant`` and ``prompt`` any others, which come back with the answer
    error: str | None = None

    @property
    def tenant(self) -> str | None:
        """Folder of a run or of an adapter, relative to the caller's directory; None is the bare model."""
        return self.fields.get("tenant")

    @property
    def prompt(self) -> str:
        return str(self.fields["prompt"])


def read_requests(path: Path) -> list[Request]:
    """The lines of a file, empty ones left out. Raises UserError where it cannot be read at all, or has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"generate.tenants: '{path}' cannot be read: {error}") from None
    found = [_request(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"generate.tenants: '{path}' has no lines")
    return found


def _request(number: int, line: str) -> Request:
    try:
        fields = json.loads(line)
    except ValueError as error:
        return Request({"line": number}, f"no JSON: {error}")
    if not isinstance(fields, dict):
        return Request({"line": number}, 'no object {"tenant": FOLDER, "prompt": TEXT}')
    if not isinstance(fields.get("prompt"), str):
        return Request(fields, "'prompt' is missing or no text")
    if not isinstance(fields.get("tenant"), str | None):
        return Request(fields, "'tenant' is no folder (null is the bare model)")
    return Request(fields)
