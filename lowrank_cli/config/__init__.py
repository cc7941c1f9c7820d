"""Configuration: the only package that imports Hydra.

Hydra's entry point takes over the command line, its errors and the exit code, so its components are used separately:
the loader composes, the override parser expands sweeps, the launchers start jobs. Composition comes first: mistakes in
the input are found before anything is written.

Public names are imported on first use, since importing Hydra takes a quarter of a second.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "composition": ("Composed", "Source", "compose", "restore"),
    "completion": ("completions",),
    "folders": ("GROUPS", "conf_folders", "description", "files"),
    "sweep": ("JobFolder", "Launcher", "expand", "is_launcher_override", "saved_launcher"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
