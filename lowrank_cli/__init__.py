"""lowrank_cli: low-rank adaptation of pretrained transformers, from the command line (``lrk``) and from Python.

    import lowrank_cli as lrk

    adapter = lrk.adapt(model, "milora", rank=8)

:mod:`lowrank_cli.api` says more. Names are looked up when they are used, so that ``lrk --help`` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_cli.api import Adapter, Bank, LrkError, UserError, WorkFailed, adapt, load

__all__ = ["Adapter", "Bank", "LrkError", "UserError", "WorkFailed", "adapt", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("lowrank_cli.api"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
