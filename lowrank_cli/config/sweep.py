"""Sweeps: the override parser expands them, Hydra's launchers start the jobs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from lowrank_cli.config.composition import loader
from lowrank_cli.config.errors import Failure, explained, refuse_unsupported
from lowrank_cli.errors import UserError
from lowrank_cli.schema import Override, parse_overrides, quoted


@dataclass
class JobFolder:
    """What a launcher passes to one run of a sweep or study."""

    folder: str = ""  #: prepared run folder
    root: str = ""  #: folder of the sweep or study


def expand(verb: str, overrides: Sequence[str], config_dir: str | None = None) -> list[list[str]]:
    """One list of overrides for each job of a sweep, in the order of the values given."""
    load = loader(config_dir)
    with explained(Failure(load, verb, parse_overrides(overrides))):
        parsed = OverridesParser.create(config_loader=load).parse_overrides(list(overrides))
        refuse_unsupported(parsed)
        if not any(override.is_sweep_override() for override in parsed):
            raise UserError("-m: nothing to sweep over; give a key several values, such as seed=0,1,2, or leave out -m")
        if not (combinations := BasicSweeper.split_arguments(parsed, None)[0]):
            raise UserError("-m: one of the keys has no values to sweep over, as with a glob that fits nothing")
        return combinations


def is_launcher_override(override: str) -> bool:
    """Whether an override is for Hydra's launcher; :class:`UserError` for another of Hydra's own keys."""
    if not override.startswith(("hydra.", "hydra/")):
        return False
    if not re.fullmatch(r"hydra/launcher=[\w-]+|hydra\.launcher(\.[a-zA-Z]\w*)+=.*", override, re.DOTALL):
        raise UserError(
            f"{override}: of Hydra's own keys only hydra/launcher=NAME and hydra.launcher.KEY=VALUE can be set"
        )
    return True


def saved_launcher(overrides: Sequence[str]) -> list[str]:
    """The launcher's overrides of a saved sweep or study, if they are safe: it may come from anybody.

    Raises UserError for any other override, and for a value other than a number or a word: it could be a command.
    """
    for override in overrides:
        value = Override.parse(override).value
        if not (is_launcher_override(override) and re.fullmatch(r"[\w.-]*", value)):
            raise UserError(
                f"--resume: it was started with {override}; type that again, or another launcher, after --resume"
            )
    return list(overrides)


def _refuse_code(value: Any, override: str) -> None:
    """Refuse settings that Hydra would call or interpolate instead of passing them on."""
    if isinstance(value, dict):
        for key, item in value.items():
            if str(key).startswith("_"):
                raise UserError(f"{override}: '{key}' is not a setting of a launcher")
            _refuse_code(item, override)
    elif isinstance(value, list):
        for item in value:
            _refuse_code(item, override)
    elif isinstance(value, str | QuotedString) and "${" in str(value):
        raise UserError(f"{override}: a launcher's settings are saved with the sweep, so they are plain values")


class Launcher:
    """Starts the jobs of a sweep, one after another or as ``hydra/launcher=…`` says."""

    def __init__(self, overrides: Sequence[str]):
        """Check the overrides (``hydra/launcher=…``, ``hydra.launcher.*``). Raises UserError for wrong ones."""
        self._overrides = list(overrides)
        self._loader = loader()  # without the user's files: Hydra would call what they name
        with explained(Failure(self._loader, "_job", parse_overrides(self._overrides))):
            for override in OverridesParser.create().parse_overrides(self._overrides):
                _refuse_code(override.value(), override.input_line or "")
        ConfigStore.instance().store(name="_job", node=JobFolder)
        self._compose(Path())

    def _compose(self, folder: Path) -> DictConfig:
        fixed = [
            f"hydra.sweep.dir={quoted(str(folder))}",
            "hydra.sweep.subdir=.",
            "hydra.output_subdir=null",
            "hydra/hydra_logging=none",
            "hydra/job_logging=none",
        ]
        with explained(Failure(self._loader, "_job", parse_overrides(self._overrides))):
            return self._loader.load_configuration("_job", [*self._overrides, *fixed], RunMode.MULTIRUN)

    def launch(self, function: Callable[[JobFolder], None], folder: Path, jobs: Sequence[Path]) -> None:
        """Call ``function``, which is module-level and raises nothing, for each job of the sweep in ``folder``."""
        cfg = self._compose(folder)
        launcher = Plugins.instance().instantiate_launcher(
            config=cfg,
            hydra_context=HydraContext(config_loader=self._loader, callbacks=Callbacks(cfg)),
            task_function=function,
        )
        root = f"root={quoted(str(folder))}"
        singletons = Singleton._instances
        try:
            launcher.launch([[f"folder={quoted(str(job))}", root] for job in jobs], initial_job_idx=0)
        finally:  # a launcher that ran a job in this process left copies of them, which later compositions do not read
            Singleton._instances = singletons
