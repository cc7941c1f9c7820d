"""Copies what a method's files hold into its section, so that the saved configuration is what ran."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lowrank_cli.schema import MethodConfig


def inline_files(section: Any, given: Iterable[str], later: tuple[str, ...] = ()) -> None:
    """Update a method's section with the values from the files that it names.

    Args:
        given: the section's keys that the user set.
        later: prefixes of paths that do not exist yet; a section with such a path is left as it is.
    """
    kind = OmegaConf.get_type(section) if isinstance(section, DictConfig) else None
    if not (isinstance(kind, type) and issubclass(kind, MethodConfig)) or OmegaConf.missing_keys(section):
        return  # composition reports the mistake
    if any(isinstance(value, str) and value.startswith(later) for value in section.values()):
        return
    for key, value in OmegaConf.to_object(section).values_from_files(set(given)).items():  # type: ignore[union-attr]
        OmegaConf.update(section, key, value, merge=False)
