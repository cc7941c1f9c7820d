"""The command lines of ``generate``, ``serve`` and ``bench`` as overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lowrank_cli.config.folders import files
from lowrank_cli.errors import UserError, require_choice
from lowrank_cli.runs.prompt_file import read_requests
from lowrank_cli.runs.tenant_file import read_tenants
from lowrank_cli.schema import quoted

OVERRIDE = re.compile(r"[~+]{0,2}[\w./@]+=|~\w")
COUNTS = "bench.tenants="


def generate(arguments: Sequence[str]) -> list[str]:
    """The arguments of ``lrk generate`` as overrides.

    A prompt becomes ``generate.prompt``. A file of prompts adds the model of its first tenant that is a run, unless
    the arguments choose one.

    Raises:
        UserError: there are several prompts.
    """
    prompts = [argument for argument in arguments if not OVERRIDE.match(argument)]
    if len(prompts) > 1:
        raise UserError(
            f"generate: one prompt at a time, not {len(prompts)}; quote it as one word, or give a file (--tenants FILE)"
        )
    overrides = [f"generate.prompt={quoted(item)}" if item in prompts else item for item in arguments]
    if file := _tenants_file(arguments, "generate.tenants="):
        requests = [request for request in read_requests(file) if request.error is None]
        overrides.append(_model_of(request.tenant for request in requests if request.tenant is not None))
    return overrides


def serve(arguments: Sequence[str]) -> list[str]:
    """The arguments of ``lrk serve`` as overrides, with the model of the first tenant as :func:`generate` adds it."""
    file = _tenants_file(arguments, "serve.tenants=")
    return [*arguments, _model_of(read_tenants(file).values())] if file else [*arguments]


def _tenants_file(arguments: Sequence[str], key: str) -> Path | None:
    """The file in the last argument that begins with ``key``; None if arguments choose a model, or there is no file."""
    files = [item.removeprefix(key) for item in arguments if item.startswith(key)]
    chosen = any(item.startswith(("run=", "model=", "method=")) for item in arguments)
    return Path(files[-1].strip("'\"")).expanduser() if files and files[-1] != "null" and not chosen else None


def _model_of(folders: Iterable[str]) -> str:
    """The override that takes the model of the first folder that is a run or in one; without one, the default model."""
    for folder in folders:
        path = Path(os.path.expanduser(folder))
        for home in (path, path.parent):
            if os.path.isfile(home / "run.json"):  # False for an invalid path
                return f"run={home}"
    return "method=none"


def bench(arguments: Sequence[str], config_dir: str | None = None) -> list[str]:
    """The arguments of ``lrk bench`` as overrides: a kind in front becomes ``bench=KIND``.

    Unless ``bench.batch_size`` is given, it is the largest of ``bench.tenants``; ``lrk bench serve`` has no such key.

    Raises:
        UserError: there is no such kind.
    """
    overrides = list(arguments)
    if overrides and not OVERRIDE.match(overrides[0]):
        require_choice("bench", overrides[0], files("bench", config_dir))
        overrides[0] = f"bench={overrides[0]}"
    counts = [item for item in overrides if re.fullmatch(re.escape(COUNTS) + r"\[[\d, ]+\]", item)]
    if counts and overrides[0] != "bench=serve" and not any(item.startswith("bench.batch_size=") for item in overrides):
        overrides.append(f"bench.batch_size={max(1, *map(int, re.findall(r'[0-9]+', counts[-1])))}")
    return overrides


def tenants(arguments: Sequence[str], counts: str) -> list[str]:
    """The arguments of ``lrk bench --tenants COUNTS``, which turns ``decode`` into ``tenants``."""
    named = bool(arguments) and not OVERRIDE.match(arguments[0])
    kind, rest = (arguments[0], arguments[1:]) if named else ("decode", arguments)
    return ["tenants" if kind == "decode" else kind, *rest, f"{COUNTS}[{counts}]"]
