"""The head of an encoder that answers with a number, in the units of the training set.

y = mean + deviation · (w h + b), with mean and deviation of the training numbers, is a linear in h again: a fresh head
starts from (deviation · w, mean), and learns with deviation times the learning rate, as Adam's steps do not depend on
the size of gradients. So numbers of any scale are learnt like those with mean 0 and deviation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

import torch
from torch import nn

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.target_sites import head_names


def rates(adapter: Adapter, numbers: Sequence[float], peak: float) -> dict[str, float]:
    """Peak learning rates of the head's last linear, by name in ``adapter.trained``; ``peak`` is that of the others."""
    names = {id(parameter): name for name, parameter in adapter.trained.items()}
    return {names[id(parameter)]: peak * _deviation(numbers) for parameter in _last_linear(adapter).parameters()}


@torch.no_grad()
def start_from(adapter: Adapter, numbers: Sequence[float]) -> None:
    """Let the answers of a fresh head have the mean of ``numbers``, and scatter as they do."""
    linear = _last_linear(adapter)
    linear.weight *= _deviation(numbers)
    if linear.bias is not None:
        linear.bias.fill_(fmean(numbers))


def _deviation(numbers: Sequence[float]) -> float:
    """The standard deviation; 1 if all are alike."""
    return pstdev(numbers) or 1.0


def _last_linear(adapter: Adapter) -> nn.Linear:
    heads = [adapter.model.get_submodule(name) for name in head_names(adapter.model)]
    linears = [module for head in heads for module in head.modules() if isinstance(module, nn.Linear)]
    return next(linear for linear in reversed(linears) if linear.out_features == 1)
