"""The methods that a benchmark compares, each composed from its file and the settings given with its name."""

from __future__ import annotations

import re
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import OmegaConf

from lowrank_cli import methods
from lowrank_cli.config.errors import Failure, explained
from lowrank_cli.config.hydra_loader import WITHOUT_HYDRA
from lowrank_cli.config.inline_files import inline_files
from lowrank_cli.errors import UserError, inside, unknown
from lowrank_cli.methods.protocol import Adapts, Calibrates
from lowrank_cli.schema import (
    BASE,
    PEFTS,
    VLLM,
    VLLM_LORA,
    BenchConfig,
    DecodeBench,
    InContextBench,
    TrainBench,
    parse_overrides,
)

LORA = "lora"  #: the method whose settings the LoRAs of PEFT and vLLM get


def compose(load: ConfigLoaderImpl, bench: Any) -> dict[str, Any]:
    """The method's section for each entry ``NAME [KEY=VALUE]…`` of ``bench.methods``; None for the bare model.

    ``bench.rank`` replaces the rank of a method's file, but not a rank that the entry sets.

    Args:
        bench: the ``bench`` section; which entries are allowed depends on its kind.

    Raises:
        UserError: an entry is unknown, malformed or listed twice, or a required one is missing.
    """
    kind = OmegaConf.get_type(bench)
    assert kind is not None and issubclass(kind, BenchConfig)
    if BASE in kind.others and BASE not in bench.methods:
        raise UserError(f"bench.methods: '{BASE}' is missing; ratios are relative to it")
    sections: dict[str, Any] = {}
    for entry in bench.methods:
        if entry in sections:
            raise UserError(f"bench.methods: '{entry}' is listed twice")
        sections[entry] = _section(load, entry, kind, bench.rank)
    if set(sections) <= {BASE} and not issubclass(kind, DecodeBench | TrainBench):
        raise UserError("bench.methods: name a method")
    return sections


def _section(load: ConfigLoaderImpl, entry: str, kind: type[BenchConfig], rank: int | None) -> Any:
    name, *settings = entry.split()
    group = load.get_group_options("method")
    needed = Calibrates if kind is InContextBench else Adapts
    able = [choice for choice in group if choice in methods.names() and methods.can(choice, needed)]
    if name not in kind.others and (name not in group or (name in methods.names() and name not in able)):
        raise unknown("bench.methods", name, [*kind.others, *able])
    if entry in (BASE, VLLM):
        return None
    name = LORA if name in (*PEFTS, VLLM_LORA) else name
    given = parse_overrides(settings)
    if not all(setting.sets and re.fullmatch(r"\w+", setting.key) for setting in given):
        raise UserError(f"bench.methods: '{entry}' is not NAME [KEY=VALUE]…")
    overrides = [f"method={name}", *(f"method.{setting}" for setting in settings)]
    with (
        inside("method", f"bench.methods: '{entry}': method"),
        explained(Failure(load, "train", parse_overrides(overrides))),
    ):
        section = load.load_configuration("train", [*overrides, *WITHOUT_HYDRA], RunMode.RUN).method
        if rank is not None and "rank" in section and not any(setting.key == "rank" for setting in given):
            OmegaConf.update(section, "rank", rank)
        inline_files(section, [setting.key for setting in given])
    return section
