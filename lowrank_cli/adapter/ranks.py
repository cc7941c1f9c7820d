"""Ranks that change while a model trains: pruned, added, and rebuilt before an adapter is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.linear import LowRank, resized
from lowrank_cli.errors import UserError, nearest


def resize(
    adapter: Adapter,
    plan: Mapping[str, tuple[list[int], int]],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Give each module of ``plan`` the ranks (indices to keep, how many fresh ones); the others stay as they are.

    A module without ranks leaves the model, ``adapter.trained`` and the optimizer. Where ``optimizer`` is given, its
    state stays with the ranks that stay. A fresh rank has no first moment, and as second moment the mean square of the
    first moments of its module's kept ranks: a reconstruction, because Adam counts its steps for a whole tensor. Zeros
    beside a large count would make the first updates several times the learning rate; the kept second moments remember
    the large gradients of the first steps for long (β2 = 0.999), and with them a fresh rank would hardly move.
    """
    for key, (keep, fresh) in plan.items():
        part = adapter.modules[key]
        chosen = torch.tensor(keep, dtype=torch.long)
        if optimizer is not None:
            carry(part.tensors(), part.rank_axes, chosen, fresh, optimizer)
        part.resize(chosen, fresh)
        if part.rank == 0:
            adapter.emptied[key] = adapter.detach(adapter.sites[key])
            if optimizer is not None:
                _forget(part, optimizer)


def all_but_lowest(scores: Mapping[str, Sequence[float]], count: int) -> dict[str, list[int]]:
    """The ranks of each module that stay where the ``count`` lowest of all go; of equal ones the first go."""
    order = sorted((score, at, rank) for at, row in enumerate(scores.values()) for rank, score in enumerate(row))
    gone = {(at, rank) for _, at, rank in order[:count]}
    return {
        key: [rank for rank in range(len(row)) if (at, rank) not in gone]
        for at, (key, row) in enumerate(scores.items())
    }


def rebuild(
    adapter: Adapter, wanted: Mapping[str, int], source: str, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Give every module the rank that ``wanted`` names, and none to the rest, so that saved tensors fit.

    What the tensors hold is left to loading. Raises UserError for a module or a rank that the model cannot have.
    """
    if wanted == adapter.ranks():
        return
    for key, rank in wanted.items():
        site = adapter.sites.get(key)
        if site is None:
            raise UserError(f"{source}: has '{key}', which this method does not make{nearest(key, adapter.sites)}")
        if not 1 <= rank <= min(site.in_features, site.out_features):
            raise UserError(f"{source}: rank {rank} of '{key}' does not fit {site.out_features} × {site.in_features}")
        if key in adapter.emptied:
            adapter.attach(site, adapter.emptied.pop(key))
    plan = {}
    for key, rank in adapter.ranks().items():
        new = wanted.get(key, 0)
        if adapter.modules[key].rank_axes:  # other kinds take the shapes of saved tensors themselves
            plan[key] = (list(range(min(rank, new))), max(0, new - rank))
    resize(adapter, plan, optimizer)
    _in_order(adapter)


def _in_order(adapter: Adapter) -> None:
    """Modules and trained tensors in the order of the sites, which optimizers count them by."""
    adapter.modules = {key: adapter.modules[key] for key in adapter.sites if key in adapter.modules}
    own = {f"{key}.{name}": p for key, part in adapter.modules.items() for name, p in part.trained().items()}
    adapter.trained = own | {name: p for name, p in adapter.trained.items() if name not in own}


def carry(
    tensors: Mapping[str, torch.nn.Parameter],
    axes: Mapping[str, int],
    keep: torch.Tensor,
    fresh: int,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Resize the moments of ``tensors`` as they are about to be; ``axes``: which one counts the ranks."""
    beta2 = optimizer.param_groups[0]["betas"][1]
    for name, axis in axes.items():
        state = optimizer.state.get(tensors[name], {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                state[moment] = resized(state[moment], axis, keep, fresh)
        if state and fresh and len(keep):
            recent = state["exp_avg"].narrow(axis, 0, len(keep)).square().mean(dim=axis, keepdim=True)
            new = state["exp_avg_sq"].narrow(axis, len(keep), fresh)
            new.copy_((recent * (1 - beta2 ** float(state["step"]))).expand_as(new))  # as Adam divides it again
        elif state and not len(keep):
            optimizer.state.pop(tensors[name])  # counts from 0 again


def _forget(part: LowRank, optimizer: torch.optim.Optimizer) -> None:
    """Drop the parameters of ``part`` from the optimizer."""
    gone = {id(parameter) for parameter in part.tensors().values()}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in part.tensors().values():
        optimizer.state.pop(parameter, None)
