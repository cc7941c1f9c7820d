"""The state of an optimizer as named tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_cli.errors import UserError

#: What optimizers keep of a tensor, in one of these sets: Adam, Muon, Adafactor (of vectors, of matrices),
#: schedule-free Adam, and Adam in 8 bits (of small tensors, of large ones).
STATES: tuple[Collection[str], ...] = (
    {"step", "exp_avg", "exp_avg_sq"},
    {"momentum_buffer"},
    {"step", "exp_avg_sq", "RMS"},
    {"step", "exp_avg_sq_row", "exp_avg_sq_col", "RMS"},
    {"z", "exp_avg_sq"},
    {"step", "state1", "state2"},
    {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"},
)
ALIKE = {"exp_avg", "exp_avg_sq", "momentum_buffer", "z", "state1", "state2"}  #: have the shape of their tensor
NUMBERS = {"step", "RMS"}
COUNTERS = ("k", "weight_sum", "lr_max")  #: what a schedule-free optimizer counts in each parameter group
NUMERIC = {int: torch.int64, float: torch.float64}  #: how Python's numbers are saved, and recognised


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as flat tensors, without its settings.

    Names are ``<parameter index>.<name>``, and ``group<index>.<name>`` for what a parameter group counts.
    """
    flat = {
        f"{index}.{key}": _tensor(value)
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    counted = {
        f"group{index}.{key}": _tensor(group[key])
        for index, group in enumerate(optimizer.param_groups)
        for key in COUNTERS
        if key in group
    }
    return flat | counted


def load_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor], source: str) -> None:
    """Restore :func:`moments`. Raises UserError, naming ``source``, if ``saved`` does not fit the optimizer."""
    parameters = _parameters(optimizer)
    groups = {f"group{index}": dict(group) for index, group in enumerate(optimizer.state_dict()["param_groups"])}
    nested: dict[int, dict[str, Any]] = {}
    for name, value in saved.items():
        index, _, key = name.partition(".")
        if index in groups and key in COUNTERS and key in groups[index] and value.shape == ():
            groups[index][key] = value.item()
            continue
        known = index.isdecimal() and int(index) < len(parameters) and any(key in state for state in STATES)
        if not known or not _fits(key, value, parameters[int(index)]):
            raise UserError(f"{source}: '{name}' {tuple(value.shape)} is no moment of the {len(parameters)} tensors")
        number = value.dtype in NUMERIC.values() and value.shape == ()
        nested.setdefault(int(index), {})[key] = value.item() if number else value
    for at, state in nested.items():
        if state.keys() not in STATES:
            raise UserError(f"{source}: of tensor {at} it holds {', '.join(state)} only")
    optimizer.load_state_dict({"state": nested, "param_groups": list(groups.values())})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=NUMERIC[type(value)])


def _fits(key: str, value: Tensor, parameter: Tensor) -> bool:
    if key in NUMBERS:
        return value.shape == ()
    if key in ALIKE:
        return value.shape == parameter.shape
    if key == "exp_avg_sq_row":
        return value.shape == parameter.shape[:-1]
    if key == "exp_avg_sq_col":
        return value.shape == parameter.shape[:-2] + parameter.shape[-1:]
    return value.dim() == 1
