"""The registry: every file or folder here, except the protocol, is a method with that name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from omegaconf import MISSING

from lowrank_cli.errors import UserError, inside, require_choice, unknown
from lowrank_cli.methods.protocol import STAGE_NEEDS, Method
from lowrank_cli.reader import check
from lowrank_cli.schema import MethodConfig


@cache
def _classes() -> dict[str, type[Method]]:
    classes = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "protocol":
            continue
        namespace = vars(importlib.import_module(f"{__name__}.{module.name}"))
        local = [c for c in namespace.values() if isinstance(c, type) and c.__module__.endswith(f".{module.name}")]
        (classes[module.name],) = [c for c in local if issubclass(c, Method)]
    return classes


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(_classes())


def config_classes() -> dict[str, type[MethodConfig]]:
    """The config schema of each method."""
    return {name: method.Config for name, method in _classes().items()}


def having(key: str) -> list[str]:
    """The methods that have a setting ``key``."""
    return [name for name, config in config_classes().items() if key in (item.name for item in fields(config))]


def capabilities(name: str) -> set[str]:
    """The stages that method ``name`` can run."""
    return {stage for stage, needs in STAGE_NEEDS.items() if can(name, *needs) and not refusal(name, stage)}


def refusal(name: str, stage: str) -> str:
    """Why method ``name`` refuses ``stage``; empty if it does not."""
    method = _class(name)
    merging = method.unmergeable and f"{method.unmergeable}, so no single weight equals them"
    return {"export": merging, "score": method.unprunable, "prune": method.unprunable}.get(stage, "")


def can(name: str, *capabilities: type) -> bool:
    """Whether method ``name`` has one of ``capabilities`` (:mod:`lowrank_cli.methods.protocol`)."""
    return issubclass(_class(name), capabilities)


def of_peft(options: Mapping[str, Any]) -> str:
    """The method that computes what an adapter with the ``options`` of PEFT's LoRA configuration computes."""
    return "dora" if options.get("use_dora") else "lora"


def published_speeds() -> dict[str, Mapping[tuple[str, int], float]]:
    """:attr:`Method.published_speed` of every method."""
    return {name: method.published_speed for name, method in _classes().items()}


def create(config: MethodConfig) -> Method:
    """The method for ``config``."""
    return _class(config.name)(config)


def configured(values: Mapping[str, Any], source: str, given: Collection[str] | None = None) -> Method:
    """The method for plain ``values``.

    Args:
        values: every key of the method, and its ``name``.
        source: where the values come from, for error messages.
        given: keys just set by the user; files that they name are then read into the config. None: values are final.

    Raises:
        UserError: the values are not the settings of a method.
    """
    kinds = config_classes()
    require_choice(f"{source}: method.name", values.get("name"), kinds)
    kind = kinds[values["name"]]
    check(values, kind, source, "method")
    keys = [item.name for item in fields(kind)]
    for key in values:
        require_choice(f"{source}: method", key, keys)
    config = kind(**values)
    for key in keys:
        if getattr(config, key) == MISSING:
            raise UserError(f"{source}: method.{key} is missing")
    with inside("method", f"{source}: method"):
        for key, value in config.values_from_files(given).items() if given is not None else ():
            setattr(config, key, value)
        config.validate()
    return create(config)


def _class(name: str) -> type[Method]:
    if name not in _classes():
        raise unknown("method", name, names())
    return _classes()[name]
