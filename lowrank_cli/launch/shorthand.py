"""The command lines of ``generate`` and ``bench`` as overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lowrank_cli.config.composition import quoted
from lowrank_cli.config.folders import files
from lowrank_cli.errors import UserError, require_choice
from lowrank_cli.runs.prompt_file import read_requests

OVERRIDE = re.compile(r"[~+]{0,2}[\w./@]+=|~\w")
FILE, COUNTS = "generate.tenants=", "bench.tenants="


def generate(words: Sequence[str]) -> list[str]:
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
            path = Path(os.path.expanduser(request.tenant))
            for home in (path, path.parent):
                if os.path.isfile(home / "run.json"):  # no for whatever cannot be a path
                    return f"run={home}"
    return "method=none"


def bench(words: Sequence[str], config_dir: str | None = None) -> list[str]:
    """``words`` with the kind in front, if there is one, as ``bench=KIND``.

    Unless they say otherwise, a batch has as many rows as the largest of ``bench.tenants``.
    """
    found = list(words)
    if found and not OVERRIDE.match(found[0]):
        require_choice("bench", found[0], files("bench", config_dir))
        found[0] = f"bench={found[0]}"
    given = [word for word in found if re.fullmatch(re.escape(COUNTS) + r"\[[\d, ]+\]", word)]
    if given and not any(word.startswith("bench.batch_size=") for word in found):
        found.append(f"bench.batch_size={max(1, *map(int, re.findall(r'[0-9]+', given[-1])))}")
    return found


def tenants(words: Sequence[str], counts: str) -> list[str]:
    """The words of ``lrk bench`` with ``--tenants COUNTS``, which turns ``decode`` into ``tenants``."""
    kind, rest = (words[0], words[1:]) if words and not OVERRIDE.match(words[0]) else ("decode", words)
    return ["tenants" if kind == "decode" else kind, *rest, f"{COUNTS}[{counts}]"]
