"""The modules that ``lrk prune`` keeps, and the setting that hands them to the training of other tasks."""

from __future__ import annotations

from itertools import chain
from typing import Any

from lowrank_cli import methods
from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.target_sites import layers
from lowrank_cli.errors import UserError
from lowrank_cli.runs import Run
from lowrank_cli.schema import PruneConfig, PruneRun
from lowrank_cli.scoring.cut import Cut
from lowrank_cli.scoring.heatmaps import heat_map
from lowrank_cli.scoring.kinds import Scores
from lowrank_cli.scoring.selection import FILE, Module, Selection, choose, text

Values = dict[str, list[float]]


def chosen(settings: PruneConfig, adapter: Adapter, values: Values) -> dict[str, list[int]]:
    """The ranks of every module that stay: all of those that :func:`choose` keeps, none of the others."""
    places = places_of(adapter)
    kept = choose(settings, {places[key]: row[0] for key, row in values.items()})
    return {
        key: list(range(part.rank)) if places[key][1] in kept[str(places[key][0])] else []
        for key, part in adapter.modules.items()
    }


def cut(settings: PruneConfig, adapter: Adapter, window: float) -> Cut | None:
    """Where :func:`chosen` cuts off: in each layer, or in the model as one. None where roles are chosen by sums."""
    if settings.same_roles:
        return None
    layers: dict[int, list[str]] = {}
    for key, (layer, _) in places_of(adapter).items():
        layers.setdefault(layer, []).append(key)
    if settings.keep is not None and settings.per_layer is not False:
        return Cut(window, [(keys, max(0, len(keys) - settings.keep)) for keys in layers.values()])
    total = settings.keep_total or (settings.keep or 0) * len(layers)
    return Cut(window, [([*chain(*layers.values())], len(adapter.modules) - total)])


def places_of(adapter: Adapter) -> dict[str, Module]:
    """Layer and role of every module, layer by layer. Raises UserError for one that has none."""
    found = {}
    for key in adapter.modules:
        site = adapter.sites[key]
        if site.layer is None or site.role is None:
            raise UserError(f"prune: '{key}' has no layer and role that a setting could name; prune ranks instead")
        found[key] = (site.layer, site.role)
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def write(run: Run, config: PruneRun, source: Run, adapter: Adapter, scores: Scores, keep: dict[str, list[int]]) -> Any:
    """Write the setting into ``run``'s folder, before the adapter is resized. Returns the figure that shows it.

    It names every layer of the model, those too where the adapter had no module. ``source`` is the run that the scores
    came from.
    """
    places = places_of(adapter)
    kept: dict[str, list[str]] = {str(layer): [] for layer in range(len(layers(adapter.model)))}
    for key, (layer, role) in places.items():
        kept[str(layer)] += [role] * bool(keep[key])
    used = source.config("model.name", "task.name", "seed")
    about = {
        "family": adapter.model.config.model_type,
        "source": {
            "run": "/".join(source.path.resolve().parts[-2:]),
            "model": used["model"]["name"],
            "task": used["task"]["name"],
            "seed": used["seed"],
        },
        "kind": scores.kind,
        "kept": _rule(config.prune),
    }
    table = {place: scores.values[key][0] for key, place in places.items()}
    selection = Selection(config.name or f"{scores.kind} {about['kept']}", kept)
    run.write_text(FILE, text(selection, table, about, methods.having("setting")[0]))
    return heat_map(adapter, scores, [key for key, ranks in keep.items() if ranks]) | {"file": "setting.png"}


def _rule(settings: PruneConfig) -> str:
    """By which modules were kept: ``keep=2``."""
    usual = {"per_layer": True, "same_roles": False}
    used = {key: value for key, value in vars(settings).items() if value is not None and value is not usual.get(key)}
    return " ".join(f"{key}={str(value).lower()}" for key, value in sorted(used.items()))
