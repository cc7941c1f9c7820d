"""What computes the updates of a bank, by ``hardware.grouped``."""

from __future__ import annotations

import importlib.util

from torch import nn

from lowrank_cli.adapter.tenants.grouped_update import GroupedUpdate
from lowrank_cli.errors import UserError
from lowrank_cli.native.kernels import Kernels, kernels_for


def require_grouped(grouped: str | None) -> None:
    """Raise UserError if the package that ``hardware.grouped`` needs is missing."""
    if grouped == "triton" and importlib.util.find_spec("triton") is None:
        raise UserError("hardware.grouped: triton needs the package triton; install it, or set hardware.grouped=torch")


def update_name(update: type[GroupedUpdate] | Kernels) -> str:
    """What the results of a run call ``update``: ``torch``, ``triton`` or ``our kernels``."""
    if isinstance(update, Kernels):
        return "our kernels"
    return "torch" if update is GroupedUpdate else "triton"


def update_class(grouped: str | None, model: nn.Module) -> type[GroupedUpdate] | Kernels:
    """What ``hardware.grouped`` names; None: the kernels for the CPU where they suit ``model``, else ``torch``."""
    if grouped is None and (kernels := kernels_for(model)):
        return kernels
    if grouped in (None, "torch"):
        return GroupedUpdate
    assert grouped == "triton"
    from lowrank_cli.adapter.tenants.grouped_triton import TritonUpdate

    return TritonUpdate
