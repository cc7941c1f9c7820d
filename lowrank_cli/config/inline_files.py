"""What a method's section takes from files that it names, so that the saved configuration is what ran."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lowrank_cli.schema import MethodConfig


def absorb(section: Any, given: Iterable[str], later: tuple[str, ...] = ()) -> None:
    """Put these values into ``section``, whose keys ``given`` the user set; files below ``later`` are made later."""
    kind = OmegaConf.get_type(section) if isinstance(section, DictConfig) else None
    if not (isinstance(kind, type) and issubclass(kind, MethodConfig)) or OmegaConf.missing_keys(section):
        return  # composing goes on to say what is wrong
    if any(isinstance(value, str) and value.startswith(later) for value in section.values()):
        return
    for key, value in OmegaConf.to_object(section).absorb(set(given)).items():  # type: ignore[union-attr]
        OmegaConf.update(section, key, value, merge=False)
