"""A selection: the low-rank modules that each layer keeps. A short YAML file, from ``lrk prune`` or written by hand.

Only ``layers`` is required: layer → roles, with one entry for every layer of the model (``3: []`` keeps none), or
``all: [V, D]`` for the same roles everywhere. ``name`` identifies it in comparisons. The rest says where it comes from:
``family`` and ``source`` of the scores, their ``kind``, the rule by which modules were ``kept``, and the ``scores`` by
layer and role.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lowrank_cli.errors import UserError, nearest, require_choice
from lowrank_cli.reader import read_yaml
from lowrank_cli.schema import PruneConfig

if TYPE_CHECKING:
    from lowrank_cli.adapter.target_sites import Site

SETTING = "setting.yaml"
EVERY = "all"  #: stands for every layer
KEYS = ("name", "layers", "family", "source", "kind", "kept", "scores")
HEADER = """\
# The LoRA modules that are kept, by layer (Q K V O attention; G U D feed-forward). To train any task with them:
#   lrk train method={method} method.setting=FILE
# Only `layers` is needed. `name` is how lrk compare calls the setting: give a changed copy a name of its own.
"""

Layers = dict[str, list[str]]  #: layer, or :data:`EVERY`, → roles
Module = tuple[int, str]  #: layer and role


@dataclass(frozen=True)
class Selection:
    """The name and modules of a selection file."""

    name: str
    layers: Layers


def read(path: str | Path) -> Selection:
    """The selection in a file. Raises UserError if the file is not a selection."""
    if not Path(path).is_file():
        folder = Path(path).parent
        beside = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"method.setting: there is no file '{path}'{nearest(Path(path).name, beside)}")
    try:
        content = read_yaml(Path(path), Any)
    except UserError as error:
        raise UserError(f"method.setting: {error}") from None
    listed = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"method.setting: '{path}' has no 'layers' (such as: layers: {{0: [Q, V], 1: [D]}})")
    for key in content:
        require_choice(f"method.setting: '{path}'", key, KEYS)
    for layer, roles in listed.items():
        number = isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0
        if not (number or (layer == EVERY and len(listed) == 1)):
            raise UserError(f"method.setting: '{layer}' is no layer in '{path}' (allowed: 0, 1, …; or {EVERY} alone)")
        if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
            raise UserError(f"method.setting: layer {layer} in '{path}' must be a list of roles, such as [Q, V]")
    name = content.get("name") or Path(path).stem
    return Selection(str(name), {str(layer): list(roles) for layer, roles in listed.items()})


def text(selection: Selection, scores: Mapping[Module, float], about: Mapping[str, Any], method: str) -> str:
    """The content of a selection file, with which ``method`` trains; ``about`` is between the layers and the scores."""
    parts = [
        HEADER.format(method=method),
        yaml.safe_dump({"name": selection.name}, allow_unicode=True),
        _table("layers", {layer: f"[{', '.join(roles)}]" for layer, roles in selection.layers.items()}),
        yaml.safe_dump(dict(about), sort_keys=False, allow_unicode=True),
        _table("scores", {str(layer): _row(scores, layer) for layer in sorted({layer for layer, _ in scores})}),
    ]
    return "".join(parts)


def _table(name: str, rows: Mapping[str, str]) -> str:
    return "".join([f"{name}:\n", *(f"  {key}: {row}\n" for key, row in rows.items())])


def _row(scores: Mapping[Module, float], layer: int) -> str:
    return "{" + ", ".join(f"{role}: {score:.4g}" for (own, role), score in scores.items() if own == layer) + "}"


def choose(prune: PruneConfig, scores: Mapping[Module, float]) -> Layers:
    """The modules to keep; ties are kept in the order of ``scores``.

    Raises UserError for an impossible number of modules.
    """
    layers = sorted({layer for layer, _ in scores})
    per_layer = prune.per_layer is not False
    order = sorted(scores, key=lambda module: -scores[module])  # stable
    every = f"{len(layers)} layers have {len(scores)} modules"
    if prune.keep is not None and per_layer:
        most = max(sum(own == layer for own, _ in scores) for layer in layers)
        _require("keep", prune.keep, 1, most - 1, f"a layer has {most} modules")
    elif prune.keep is not None:
        _require("keep", prune.keep, 1, (len(scores) - 1) // len(layers), every)
    if prune.same_roles:
        sums: dict[str, float] = {}
        for (_, role), score in scores.items():
            sums[role] = sums.get(role, 0.0) + score
        kept = sorted(sums, key=lambda role: -sums[role])[: prune.keep]
        return _by_layer([module for module in scores if module[1] in kept], scores, layers)
    if prune.keep is not None and per_layer:
        best = [[module for module in order if module[0] == layer][: prune.keep] for layer in layers]
        return _by_layer([module for own in best for module in own], scores, layers)
    if prune.keep_total is not None:
        _require("keep_total", prune.keep_total, len(layers) if per_layer else 1, len(scores) - 1, every)
    total = prune.keep_total or (prune.keep or 0) * len(layers)
    first = [next(module for module in order if module[0] == layer) for layer in layers] if per_layer else []
    rest = [module for module in order if module not in first]
    return _by_layer(first + rest[: total - len(first)], scores, layers)


def _require(key: str, value: int, low: int, high: int, why: str) -> None:
    if not low <= value <= high:
        allowed = f"allowed: {low} to {high}" if low <= high else "none can be taken out"
        raise UserError(f"prune.{key}: {value} is out of range ({allowed}; {why})")


def _by_layer(kept: Sequence[Module], scores: Mapping[Module, float], layers: Sequence[int]) -> Layers:
    return {str(layer): [role for own, role in scores if own == layer and (own, role) in kept] for layer in layers}


def fitting(layers: Mapping[str, Sequence[str]], sites: Sequence[Site], family: str) -> list[Site]:
    """The ``sites`` of a model that a selection keeps. Raises UserError if layers or roles do not match."""
    by_role = {(site.layer, site.role): site for site in sites}
    depth = 1 + max((site.layer for site in sites if site.layer is not None), default=-1)
    if not depth:
        raise UserError(f"method.setting: the layers and roles of the model's family '{family}' are not known")
    named = {str(layer): layers[EVERY] for layer in range(depth)} if EVERY in layers else layers
    wanted = [str(layer) for layer in range(depth)]
    if named.keys() != set(wanted):
        first = next(layer for layer in range(len(named) + 1) if str(layer) not in named)
        what = f"it is for {first} layer{'s' * (first != 1)}" if first == len(named) else f"it lacks layer {first}"
        raise UserError(
            f"method.setting: {what}, and this model has {depth} (0 to {depth - 1}; [] keeps none of a layer)"
        )
    kept = [(layer, role) for layer in range(depth) for role in dict.fromkeys(named[str(layer)])]
    for layer, role in kept:
        if (layer, role) not in by_role:
            roles = [known for at, known in by_role if at == layer and known is not None]
            meant = f"{nearest(role.upper(), roles)} (it has {' '.join(roles)})"
            raise UserError(f"method.setting: layer {layer} of family '{family}' has no role '{role}'{meant}")
    if not kept:
        raise UserError("method.setting: it keeps no module")
    return [site for module, site in by_role.items() if module in set(kept)]
