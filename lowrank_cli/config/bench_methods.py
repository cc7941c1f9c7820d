"""The methods that a benchmark compares, each composed from its file and the settings given with its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import OmegaConf

from lowrank_cli import methods
from lowrank_cli.config.errors import Failure, explained
from lowrank_cli.config.inline_files import absorb
from lowrank_cli.errors import UserError, inside, unknown
from lowrank_cli.methods.protocol import Adapts
from lowrank_cli.schema import BASE, PEFTS, VLLM, VLLM_LORA, parse_overrides

LORA = "lora"  #: the method whose settings the LoRAs of PEFT and vLLM get


def compose(load: ConfigLoaderImpl, entries: Sequence[str], rank: int | None) -> dict[str, Any]:
    """The method's section for each entry ``NAME [KEY=VALUE]…``; None for the bare model.

    ``rank`` replaces the rank of a file, not one that the entry itself sets.
    """
    if BASE not in entries:
        raise UserError(f"bench.methods: '{BASE}' is missing, and ratios are taken to it")
    found: dict[str, Any] = {}
    for entry in entries:
        if entry in found:
            raise UserError(f"bench.methods: '{entry}' stands there twice")
        found[entry] = None if entry in (BASE, VLLM) else _section(load, entry, rank)
    return found


def _section(load: ConfigLoaderImpl, entry: str, rank: int | None) -> Any:
    name, *settings = entry.split()
    name = LORA if name in (*PEFTS, VLLM_LORA) else name
    group = load.get_group_options("method")
    adapting = [choice for choice in group if choice in methods.names() and methods.can(choice, Adapts)]
    if name not in group or (name in methods.names() and name not in adapting):
        raise unknown("bench.methods", name, [BASE, *PEFTS, VLLM, VLLM_LORA, *adapting])
    given = parse_overrides(settings)
    if not all(setting.sets and re.fullmatch(r"\w+", setting.key) for setting in given):
        raise UserError(f"bench.methods: '{entry}' is not NAME [KEY=VALUE]…")
    overrides = [f"method={name}", *(f"method.{setting}" for setting in settings)]
    with (
        inside("method", f"bench.methods: '{entry}': method"),
        explained(Failure(load, "train", parse_overrides(overrides))),
    ):
        section = load.load_configuration("train", overrides, RunMode.RUN).method
        if rank is not None and "rank" in section and not any(setting.key == "rank" for setting in given):
            OmegaConf.update(section, "rank", rank)
        absorb(section, [setting.key for setting in given])
    return section
