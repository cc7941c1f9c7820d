"""The registry: every file of this folder is a method, known by the file's name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from lowrank_cli.errors import unknown
from lowrank_cli.methods.protocol import STAGE_NEEDS, Method
from lowrank_cli.schema import MethodConfig


@cache
def _classes() -> dict[str, type[Method]]:
    classes = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "protocol":
            continue
        namespace = vars(importlib.import_module(f"{__name__}.{module.name}"))
        found = [c for c in namespace.values() if isinstance(c, type) and c.__module__.endswith(f".{module.name}")]
        (classes[module.name],) = [c for c in found if issubclass(c, Method)]
    return classes


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(_classes())


def config_classes() -> dict[str, type[MethodConfig]]:
    """The config schema of each method."""
    return {name: method.Config for name, method in _classes().items()}


def capabilities(name: str) -> set[str]:
    """The stages that method ``name`` can run."""
    return {stage for stage, needs in STAGE_NEEDS.items() if can(name, *needs) and not refusal(name, stage)}


def refusal(name: str, stage: str) -> str:
    """Why method ``name`` refuses ``stage``, or empty where it does not or says nothing about it."""
    method = _class(name)
    merging = method.unmergeable and f"{method.unmergeable}, so no single weight equals them"
    return {"export": merging, "score": method.unprunable, "prune": method.unprunable}.get(stage, "")


def can(name: str, *capabilities: type) -> bool:
    """Whether method ``name`` has one of these capabilities of :mod:`lowrank_cli.methods.protocol`."""
    return issubclass(_class(name), capabilities)


def create(config: MethodConfig) -> Method:
    """The method that ``config`` configures."""
    return _class(config.name)(config)


def _class(name: str) -> type[Method]:
    if name not in _classes():
        raise unknown("method", name, names())
    return _classes()[name]
