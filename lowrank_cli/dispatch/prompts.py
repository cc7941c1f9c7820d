"""What ``lrk generate`` is asked on the command line, as overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lowrank_cli.config.composition import quoted
from lowrank_cli.errors import UserError
from lowrank_cli.runs.requests import read_requests

OVERRIDE = re.compile(r"[~+]{0,2}[\w./@]+=|~\w")
FILE = "generate.tenants="


def overrides(words: Sequence[str]) -> list[str]:
    """``words`` with the prompt among them as ``generate.prompt``, and with the model that a file of prompts is for."""
    prompts = [word for word in words if not OVERRIDE.match(word)]
    if len(prompts) > 1:
        raise UserError(
            f"generate: one prompt at a time, not {len(prompts)}; quote it as one word, or give a file (--tenants FILE)"
        )
    found = [f"generate.prompt={quoted(word)}" if word in prompts else word for word in words]
    files = [word.removeprefix(FILE) for word in words if word.startswith(FILE)]
    if files and files[-1] != "null" and not any(word.startswith(("run=", "model=", "method=")) for word in words):
        found.append(_model_of(Path(files[-1].strip("'\"")).expanduser()))
    return found


def _model_of(file: Path) -> str:
    """The first tenant that is a run: its model is taken. Without any, the default model."""
    for request in read_requests(file):
        if request.error is None and request.tenant is not None:
            path = Path(request.tenant).expanduser()
            for home in (path, path.parent):
                if (home / "run.json").is_file():
                    return f"run={home}"
    return "method=none"
