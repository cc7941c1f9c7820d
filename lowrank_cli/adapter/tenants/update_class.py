"""The class that computes grouped updates, by ``hardware.grouped``."""

from __future__ import annotations

import importlib.util

from lowrank_cli.adapter.tenants.grouped_update import GroupedUpdate
from lowrank_cli.errors import UserError


def require_grouped(grouped: str) -> None:
    """Raise UserError if the package that ``hardware.grouped`` needs is missing."""
    if grouped == "triton" and importlib.util.find_spec("triton") is None:
        raise UserError("hardware.grouped: triton needs the package triton; install it, or set hardware.grouped=torch")


def update_class(grouped: str) -> type[GroupedUpdate]:
    """The class for ``hardware.grouped``: ``torch``, or ``triton`` (CUDA only)."""
    if grouped == "torch":
        return GroupedUpdate
    assert grouped == "triton"
    from lowrank_cli.adapter.tenants.grouped_triton import TritonUpdate

    return TritonUpdate
