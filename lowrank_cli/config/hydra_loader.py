"""Hydra's loader, made for many compositions in one process: files are parsed once, Hydra's own settings left out."""

from __future__ import annotations

import copy
import os
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult

#: Overrides that leave out Hydra's own files, which are a third of a composition's time. A launcher needs them.
WITHOUT_HYDRA = tuple(
    f"~hydra/{group}"
    for group in ("output", "launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging")
)


class ParsedOnce(ConfigRepository):
    """Parses a file once, until the file changes.

    Hydra copies its repository for each composition, and with it every registered schema; these copies share them.
    """

    def __init__(self, search_path: ConfigSearchPath):
        super().__init__(search_path)
        self._parsed: dict[tuple[str, str], tuple[tuple[int, int] | None, ConfigResult]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ParsedOnce:
        return copy.copy(self)  # Hydra may give the copy other sources; it changes none of them

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.scheme() == "structured":
            return super().load_config(config_path)
        written = None  # a file of Hydra's does not change
        if source.scheme() == "file":
            about = os.stat(os.path.join(source.path, source._normalize_file_name(config_path)))
            written = about.st_mtime_ns, about.st_size
        key = source.path, config_path
        if key not in self._parsed or self._parsed[key][0] != written:
            result = super().load_config(config_path)
            assert result is not None
            self._parsed[key] = written, result
        result = self._parsed[key][1]
        return copy.deepcopy(result)  # composing changes it, the list of defaults too
