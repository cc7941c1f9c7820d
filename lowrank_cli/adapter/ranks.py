"""Changing the ranks of an adapter: pruned and added in training, rebuilt before loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.low_rank import LowRank, resized
from lowrank_cli.adapter.target_sites import Site
from lowrank_cli.errors import UserError, nearest


def resize(
    adapter: Adapter,
    plan: Mapping[str, tuple[list[int], int]],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Resize the modules in ``plan``; a module without ranks leaves the model, ``adapter.trained`` and the optimizer.

    A fresh rank gets a zero first moment, and as second moment the mean square of the first moments of its module's
    kept ranks. This is a reconstruction, because Adam counts steps by tensor: with zeros and a large step count
    the first updates would be several times the learning rate; the kept second moments still remember the large
    gradients of the first steps (β2 = 0.999), and a fresh rank would hardly move.

    Args:
        plan: for each module's key, the indices of the ranks to keep and the number of fresh ones.
        optimizer: its moments follow the kept ranks.
    """
    for key, (keep, fresh) in plan.items():
        module = adapter.modules[key]
        chosen = torch.tensor(keep, dtype=torch.long)
        if optimizer is not None:
            carry(module.tensors(), module.rank_axes, chosen, fresh, optimizer)
        module.resize(chosen, fresh)
        if module.rank == 0:
            adapter.emptied[key] = adapter.detach(adapter.sites[key])
            if optimizer is not None:
                _forget(module, optimizer)


def all_but_lowest(scores: Mapping[str, Sequence[float]], count: int) -> dict[str, list[int]]:
    """The ranks that each module keeps when the ``count`` lowest of all are pruned; ties prune the first."""
    order = sorted((score, at, rank) for at, row in enumerate(scores.values()) for rank, score in enumerate(row))
    gone = {(at, rank) for _, at, rank in order[:count]}
    return {
        key: [rank for rank in range(len(row)) if (at, rank) not in gone]
        for at, (key, row) in enumerate(scores.items())
    }


def require_ranks(sites: Mapping[str, Site], wanted: Mapping[str, int], source: str) -> None:
    """Raise UserError, naming ``source``, unless ``sites``, by key, can have the ``wanted`` ranks."""
    for key, rank in wanted.items():
        site = sites.get(key)
        if site is None:
            raise UserError(f"{source}: has '{key}', which this method does not make{nearest(key, sites)}")
        if not 1 <= rank <= min(site.in_features, site.out_features):
            raise UserError(f"{source}: rank {rank} of '{key}' does not fit {site.out_features} × {site.in_features}")


def rebuild(
    adapter: Adapter, wanted: Mapping[str, int], source: str, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Resize every module to its rank in ``wanted``, and remove the others, so that saved tensors fit.

    Args:
        wanted: ranks by module key.
        source: where they come from, for error messages.

    Raises:
        UserError: a module or a rank that the model cannot have.
    """
    if wanted == adapter.ranks():
        return
    require_ranks(adapter.sites, wanted, source)
    for key in wanted:
        if key in adapter.emptied:
            adapter.attach(adapter.sites[key], adapter.emptied.pop(key))
    plan = {}
    for key, rank in adapter.ranks().items():
        new = wanted.get(key, 0)
        if adapter.modules[key].rank_axes:  # other kinds adopt the shapes of saved tensors themselves
            plan[key] = (list(range(min(rank, new))), max(0, new - rank))
    resize(adapter, plan, optimizer)
    _in_order(adapter)


def _in_order(adapter: Adapter) -> None:
    """Put modules and trained tensors in the order of the sites, by which optimizers index them."""
    adapter.modules = {key: adapter.modules[key] for key in adapter.sites if key in adapter.modules}
    low_rank = {f"{key}.{name}": p for key, module in adapter.modules.items() for name, p in module.trained().items()}
    adapter.trained = low_rank | {name: p for name, p in adapter.trained.items() if name not in low_rank}


def carry(
    tensors: Mapping[str, torch.nn.Parameter],
    axes: Mapping[str, int],
    keep: torch.Tensor,
    fresh: int,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Resize the optimizer's moments of ``tensors``, as the tensors are about to be.

    Args:
        axes: by tensor name, the axis that counts ranks.
        keep: indices of the ranks to keep.
        fresh: number of ranks appended.
    """
    beta2 = optimizer.param_groups[0]["betas"][1]
    for name, axis in axes.items():
        state = optimizer.state.get(tensors[name], {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                state[moment] = resized(state[moment], axis, keep, fresh)
        if state and fresh and len(keep):
            recent = state["exp_avg"].narrow(axis, 0, len(keep)).square().mean(dim=axis, keepdim=True)
            new = state["exp_avg_sq"].narrow(axis, len(keep), fresh)
            new.copy_((recent * (1 - beta2 ** float(state["step"]))).expand_as(new))  # undoes Adam's bias correction
        elif state and not len(keep):
            optimizer.state.pop(tensors[name])  # its step count restarts


def _forget(module: LowRank, optimizer: torch.optim.Optimizer) -> None:
    """Remove the parameters of ``module`` from the optimizer."""
    gone = {id(parameter) for parameter in module.tensors().values()}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in module.tensors().values():
        optimizer.state.pop(parameter, None)
