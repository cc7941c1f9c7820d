"""The command lines of ``generate`` and ``bench`` as overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lowrank_cli.config.composition import quoted
from lowrank_cli.errors import UserError
from lowrank_cli.runs.prompt_file import read_requests

OVERRIDE = re.compile(r"[~+]{0,2}[\w./@]+=|~\w")
FILE, COUNTS = "generate.tenants=", "bench.tenants="
TRAINED = (
    "[base,lora,'lora dropout=0.05','lora target_modules=[V,D]',dora,alora,milora,moelora,adalora,sora,"
    "peft,'peft dropout=0.05']"
)


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


def bench(words: Sequence[str]) -> list[str]:
    """``words``, and what a training step or ``bench.tenants`` asks for beside it unless they say so themselves."""
    found, defaults = list(words), {}
    if "bench.measure=train" in found:
        defaults = {"bench.batch_size": "4", "bench.prompt_length": "128", "bench.rank": "16", "bench.methods": TRAINED}
    counts = [word.removeprefix(COUNTS).strip("[]").split(",") for word in found if word.startswith(COUNTS)]
    if counts and all(count.strip().isdigit() for count in counts[-1]):
        defaults = {
            "bench.batch_size": str(max(1, *map(int, counts[-1]))),
            "bench.beams": "[1]",
            "bench.methods": "[base,lora,'milora k=3',peft]",
        }
    return found + [f"{key}={value}" for key, value in defaults.items() if not any(w.startswith(key) for w in words)]
