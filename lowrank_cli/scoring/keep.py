"""What ``lrk prune`` keeps: ranks or whole modules, by their scores.

Both levels have two functions: which ranks of every module stay (``keep_ranks``, ``keep_modules``), and the cut between
kept and pruned (``rank_cut``, ``module_cut``), near which scores of kind ``mixed`` are exact.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.ranks import all_but_lowest
from lowrank_cli.errors import UserError
from lowrank_cli.schema import PruneConfig
from lowrank_cli.scoring.cut import Cut
from lowrank_cli.scoring.selection import Module, choose

Values = dict[str, list[float]]  #: key of a module → score of each rank, or one score of the module


def keep_ranks(settings: PruneConfig, adapter: Adapter, values: Values) -> dict[str, list[int]]:
    """The ranks of every module that stay: all but the lowest of the model, or of each layer."""
    groups = _groups(adapter, bool(settings.per_layer))
    drop = ranks_to_drop(settings, adapter) // len(groups)
    keep: dict[str, list[int]] = {}
    for keys in groups.values():
        keep |= all_but_lowest({key: values[key] for key in keys}, drop)
    return keep


def rank_cut(settings: PruneConfig, adapter: Adapter, window: float) -> Cut:
    """Where :func:`keep_ranks` cuts; ``window`` is ``score.window``."""
    groups = _groups(adapter, bool(settings.per_layer))
    return Cut(window, [(keys, ranks_to_drop(settings, adapter) // len(groups)) for keys in groups.values()])


def ranks_to_drop(settings: PruneConfig, adapter: Adapter) -> int:
    """How many ranks go, in the whole model.

    Raises:
        UserError: that is none, all, or with ``prune.per_layer`` not the same number in every layer.
    """
    total = sum(adapter.ranks().values())
    key, value = ("drop", settings.drop) if settings.budget is None else ("budget", settings.budget)
    assert value is not None
    drop = value if settings.budget is None else total - value
    groups = _groups(adapter, bool(settings.per_layer))
    ranks = adapter.ranks()
    fewest = min(sum(ranks[key] for key in keys) for keys in groups.values())
    count, most = len(groups), min(fewest, (total - 1) // len(groups))  # most: ranks to drop from each group
    if drop in range(count, count * most + 1, count):
        return drop
    low, high = sorted(gone if settings.budget is None else total - gone for gone in (count, count * most))
    allowed = f"allowed: {low} to {high}" if most else "none can be taken out"
    if settings.per_layer:
        why = (
            f"in steps of {count}, as prune.per_layer=true takes as many ranks out of each of {count} layers, "
            f"and one has only {fewest}; prune.per_layer=false takes the lowest of the model"
        )
        raise UserError(f"prune.{key}: {value} is out of range ({allowed} {why})")
    raise UserError(f"prune.{key}: {value} is out of range ({allowed}; the adapter has {total})")


def _groups(adapter: Adapter, per_layer: bool) -> dict[int | None, list[str]]:
    """Keys of the modules whose ranks compete with each other: those of a layer, or all."""
    groups: dict[int | None, list[str]] = defaultdict(list)
    for key in adapter.modules:
        groups[adapter.sites[key].layer if per_layer else None].append(key)
    return groups


def keep_modules(settings: PruneConfig, adapter: Adapter, values: Values) -> dict[str, list[int]]:
    """The ranks of every module that stay: all ranks of the modules that :func:`choose` keeps, none of the others."""
    sites = layer_and_role(adapter)
    kept = choose(settings, {sites[key]: row[0] for key, row in values.items()})
    return {
        key: list(range(module.rank)) if sites[key][1] in kept[str(sites[key][0])] else []
        for key, module in adapter.modules.items()
    }


def module_cut(settings: PruneConfig, adapter: Adapter, window: float) -> Cut | None:
    """Where :func:`keep_modules` cuts: in each layer, or once in the model. None if roles are chosen by their sums."""
    if settings.same_roles:
        return None
    layers: dict[int, list[str]] = {}
    for key, (layer, _) in layer_and_role(adapter).items():
        layers.setdefault(layer, []).append(key)
    if settings.keep is not None and settings.per_layer is not False:
        return Cut(window, [(keys, max(0, len(keys) - settings.keep)) for keys in layers.values()])
    total = settings.keep_total or (settings.keep or 0) * len(layers)
    return Cut(window, [([*chain(*layers.values())], len(adapter.modules) - total)])


def layer_and_role(adapter: Adapter) -> dict[str, Module]:
    """Layer and role of every module, layer by layer. Raises UserError if a module has none."""
    sites = {}
    for key in adapter.modules:
        site = adapter.sites[key]
        if site.layer is None or site.role is None:
            raise UserError(f"prune: '{key}' has no layer and role that a setting could name; prune ranks instead")
        sites[key] = (site.layer, site.role)
    return dict(sorted(sites.items(), key=lambda item: item[1][0]))
