"""Configuration: the only part that knows Hydra.

Hydra's own entry point takes over the command line, its errors and the exit code. So its parts are used one by
one: the loader composes, the override parser expands sweeps, the launchers start jobs. Composition comes before
work: whatever is wrong with the input is known before anything is written.

Public names are looked up when they are used, since importing Hydra takes a quarter of a second.
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
