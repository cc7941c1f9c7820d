"""``lrk prune``: a smaller adapter, without the ranks or modules that scored lowest; a run like a trained one."""

from __future__ import annotations

from collections import defaultdict

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.ranks import all_but_lowest, resize
from lowrank_cli.errors import UserError
from lowrank_cli.inference import progress, selection
from lowrank_cli.inference.predict import write_answers
from lowrank_cli.runs import Run, atomic_folder
from lowrank_cli.schema import AUTO, PruneConfig, PruneRun
from lowrank_cli.scoring.cut import Cut
from lowrank_cli.scoring.heatmaps import allocation
from lowrank_cli.scoring.kinds import Scores, require_ranks
from lowrank_cli.stages.evaluate import evaluate_split
from lowrank_cli.stages.score import adapted, measure, write

Values = dict[str, list[float]]


def run(config: PruneRun, run: Run, *, resume: bool = False) -> dict[str, float]:
    """Prune the adapter of ``config.run``, save it into ``run``'s folder, and return its metrics on dev and test."""
    source = Run.open(str(config.run))
    scoring = source if source.info["stage"] == "score" else None
    session, adapter = adapted(config)
    require_ranks(adapter)
    whole = config.level == "module"
    choice = selection.chosen if whole else chosen
    line = (selection.cut if whole else cut)(config.prune, adapter, config.score.window)
    none = {key: [0.0] * rank for key, rank in adapter.ranks().items()}
    choice(config.prune, adapter, none)  # refuses an amount that does not fit before anything slow
    scores = read(scoring, adapter, config.level, config.score.kind) if scoring else None
    session.greet(run)
    if scores is None:
        scores = measure(session, config.score, config.level, line)
        write(run, adapter, scores)
    exact = scores.components.get("exact", none)
    if scoring and line and session.accelerator.is_main_process and not line.measured(scores.values, exact):
        progress.console().print(
            f"'{scoring.path}' measured exactly around another cut than this; near this one its scores are taylor's "
            f"(lrk prune run={scoring.config('run')['run']} score.kind=mixed measures here)",
            soft_wrap=True,
        )
    before = {"modules_before": len(adapter.modules), "ranks_before": sum(adapter.ranks().values())}
    keep = choice(config.prune, adapter, scores.values)
    figures = [selection.write(run, config, scoring or run, adapter, scores, keep)] if whole else []
    resize(adapter, {key: (ranks, 0) for key, ranks in keep.items()})
    if session.accelerator.is_main_process:
        assert session.foundation is not None
        about = save_load.read_proof(session.foundation / "adapter")["about"]
        with atomic_folder(run.file("adapter")) as folder:
            save_load.save(adapter, folder, about)
    session.accelerator.wait_for_everyone()
    metrics = {**evaluate_split(session, "dev")[0]}
    found, records, observed = evaluate_split(session, "test")
    write_answers(run, records, [*figures, *observed.figures, allocation(adapter)])
    session.note_device(run)
    counts = {"modules": len(adapter.modules), "ranks": sum(adapter.ranks().values())}
    return {**metrics, **found, **observed.metrics, **before, **counts}


def amount(settings: PruneConfig, adapter: Adapter) -> int:
    """How many ranks go; UserError where that is none, all, not the same in each layer or more than one has."""
    total = sum(adapter.ranks().values())
    key, value = ("drop", settings.drop) if settings.budget is None else ("budget", settings.budget)
    assert value is not None
    drop = value if settings.budget is None else total - value
    groups = _groups(adapter, bool(settings.per_layer))
    ranks = adapter.ranks()
    fewest = min(sum(ranks[key] for key in keys) for keys in groups.values())
    count, most = len(groups), min(fewest, (total - 1) // len(groups))  # of each group
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


def cut(settings: PruneConfig, adapter: Adapter, window: float) -> Cut:
    """Where :func:`chosen` cuts off."""
    groups = _groups(adapter, bool(settings.per_layer))
    return Cut(window, [(keys, amount(settings, adapter) // len(groups)) for keys in groups.values()])


def chosen(settings: PruneConfig, adapter: Adapter, values: Values) -> dict[str, list[int]]:
    """The ranks of every module that stay: all but the lowest of the model, or but as many lowest of each layer."""
    groups = _groups(adapter, bool(settings.per_layer))
    drop = amount(settings, adapter) // len(groups)
    keep = {}
    for keys in groups.values():
        keep |= all_but_lowest({key: values[key] for key in keys}, drop)
    return keep


def read(scoring: Run, adapter: Adapter, level: str, kind: str | None) -> Scores:
    """The scores of a run of ``lrk score``.

    Raises UserError for another adapter's, those of another level, or of another ``kind`` where one is asked for.
    """
    record = scoring.read_json("scores.json")
    values = {entry["module"]: entry["scores"] for entry in record["modules"]}
    exact = {entry["module"]: entry["exact"] for entry in record["modules"] if "exact" in entry}
    parts = {"exact": exact} if len(exact) == len(values) else {}
    scores = Scores(record["kind"], values, parts, level=record["level"])
    below = scoring.config("run")["run"]
    if scores.level != level:
        raise UserError(
            f"run: '{scoring.path}' scored {scores.level}s, but {level}s are to be taken out; "
            f"first: lrk score run={below} score.level={level}"
        )
    if kind not in (None, AUTO, scores.kind):
        raise UserError(
            f"score.kind: '{kind}' is asked for, but '{scoring.path}' scored by '{scores.kind}' (leave score.kind out, "
            f"or name the adapter's run, which is scored first: run={below})"
        )
    expected = adapter.ranks() if level == "rank" else dict.fromkeys(adapter.ranks(), 1)
    if any({key: len(row) for key, row in rows.items()} != expected for rows in (values, *parts.values())):
        raise UserError(f"{scoring.path / 'scores.json'} does not belong to the adapter of {below}")
    return scores


def _groups(adapter: Adapter, per_layer: bool) -> dict[int | None, list[str]]:
    """Keys of the modules that compete: those of a layer, or all."""
    groups: dict[int | None, list[str]] = defaultdict(list)
    for key in adapter.modules:
        groups[adapter.sites[key].layer if per_layer else None].append(key)
    return groups
