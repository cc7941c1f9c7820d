"""``lrk prune``: a smaller adapter, without the ranks that scored lowest; evaluated, and a run like a trained one."""

from __future__ import annotations

import json
from collections import defaultdict

from lowrank_cli.adapter import state
from lowrank_cli.adapter.core import Adapter
from lowrank_cli.adapter.ranks import resize
from lowrank_cli.errors import UserError
from lowrank_cli.runs import Run, atomic_folder
from lowrank_cli.schema import PruneConfig, PruneRun
from lowrank_cli.scoring.figures import allocation
from lowrank_cli.stages.evaluate import evaluate_split
from lowrank_cli.stages.predict import write_answers
from lowrank_cli.stages.score import adapted, measure, write

Values = dict[str, list[float]]


def run(config: PruneRun, run: Run, *, resume: bool = False) -> dict[str, float]:
    """Prune the adapter of ``config.run``, save it into ``run``'s folder, and return its metrics on dev and test."""
    source = Run.open(str(config.run))
    scoring = source if source.info["stage"] == "score" else None
    session, adapter = adapted(config)
    if not adapter.modules:
        raise UserError(f"run: '{session.foundation}' has no low-rank modules to prune")
    amount(config.prune, adapter)  # before anything slow
    session.greet()
    if scoring:
        values = read(scoring, adapter)
    else:
        scores = measure(session, config.score)
        write(run, adapter, scores)
        values = scores.values
    before = sum(adapter.ranks().values())
    keep = chosen(config.prune, adapter, values)
    resize(adapter, {key: (ranks, 0) for key, ranks in keep.items()})
    if session.accelerator.is_main_process:
        assert session.foundation is not None
        about = state.read_proof(session.foundation / "adapter")["about"]
        with atomic_folder(run.file("adapter")) as folder:
            state.save(adapter, folder, about)
    session.accelerator.wait_for_everyone()
    metrics = {**evaluate_split(session, "dev")[0]}
    found, records, observed = evaluate_split(session, "test")
    write_answers(run, records, [*observed.figures, allocation(adapter)])
    session.note_device(run)
    counts = {"ranks_before": before, "ranks": sum(adapter.ranks().values()), "modules": len(adapter.modules)}
    return {**metrics, **found, **observed.metrics, **counts}


def amount(settings: PruneConfig, adapter: Adapter) -> int:
    """How many ranks go; UserError where that is none, all, or not the same in each layer."""
    total = sum(adapter.ranks().values())
    key, value = ("drop", settings.drop) if settings.budget is None else ("budget", settings.budget)
    assert value is not None
    drop = value if settings.budget is None else total - value
    if not 0 < drop < total:
        raise UserError(f"prune.{key}: {value} is out of range (allowed: 1 to {total - 1}; the adapter has {total})")
    if settings.per_layer:
        layers = len(_groups(adapter, True))
        if drop % layers:
            raise UserError(
                f"prune.{key}: {value} takes {drop} ranks out, which {layers} layers cannot share evenly; "
                f"take a multiple of {layers} out, or set prune.per_layer=false"
            )
    return drop


def chosen(settings: PruneConfig, adapter: Adapter, values: Values) -> dict[str, list[int]]:
    """The ranks of every module that stay: all but the lowest of the model, or but as many lowest of each layer."""
    groups = _groups(adapter, settings.per_layer)
    drop = amount(settings, adapter) // len(groups)
    keep = {key: set(range(rank)) for key, rank in adapter.ranks().items()}
    for layer, keys in groups.items():
        order = sorted((values[key][rank], key, rank) for key in keys for rank in keep[key])
        if drop > len(order):
            raise UserError(f"prune: layer {layer} has {len(order)} ranks, not {drop} to take out")
        for _, key, rank in order[:drop]:
            keep[key].remove(rank)
    return {key: sorted(ranks) for key, ranks in keep.items()}


def read(scoring: Run, adapter: Adapter) -> Values:
    """The scores of a run of ``lrk score``. Raises UserError where they are not of this adapter."""
    try:
        values = {entry["module"]: entry["scores"] for entry in scoring.read_json("scores.json")["modules"]}
    except (KeyError, TypeError, json.JSONDecodeError):
        raise UserError(f"{scoring.path / 'scores.json'} is damaged") from None
    if {key: len(scores) for key, scores in values.items()} != adapter.ranks():
        raise UserError(f"{scoring.path / 'scores.json'} does not belong to the adapter of {scoring.config()['run']}")
    return values


def _groups(adapter: Adapter, per_layer: bool) -> dict[int | None, list[str]]:
    """Keys of the modules that compete: those of a layer, or all."""
    groups: dict[int | None, list[str]] = defaultdict(list)
    for key in adapter.modules:
        groups[adapter.sites[key].layer if per_layer else None].append(key)
    return groups
