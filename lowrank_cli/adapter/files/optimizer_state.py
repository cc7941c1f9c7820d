"""The state of an Adam optimizer as named tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_cli.errors import UserError

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  #: Adam's state of a tensor


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as flat tensors, ``<parameter index>.<name>``, without its settings."""
    return {
        f"{index}.{key}": value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def load_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor], source: str) -> None:
    """Restore :func:`moments`. Raises UserError, naming ``source``, if ``saved`` does not fit the optimizer."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nested: dict[int, dict[str, Tensor]] = {}
    for name, value in saved.items():
        index, _, key = name.partition(".")
        known = index.isdecimal() and int(index) < len(parameters)
        if not known or key not in MOMENTS or value.shape != (() if key == "step" else parameters[int(index)].shape):
            raise UserError(f"{source}: '{name}' {tuple(value.shape)} is no moment of the {len(parameters)} tensors")
        nested.setdefault(int(index), {})[key] = value
    for at, state in nested.items():
        if state.keys() != MOMENTS:
            raise UserError(f"{source}: of tensor {at} it holds {', '.join(state)} only")
    optimizer.load_state_dict({"state": nested, "param_groups": optimizer.state_dict()["param_groups"]})
