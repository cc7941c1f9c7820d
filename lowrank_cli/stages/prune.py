"""``lrk prune``: a smaller adapter, without the ranks or modules that score lowest. Its run is like a trained one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_cli import methods
from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.ranks import resize
from lowrank_cli.adapter.target_sites import layers
from lowrank_cli.errors import UserError
from lowrank_cli.inference.predict import write_answers
from lowrank_cli.runs import Run, atomic_folder, progress
from lowrank_cli.runs.scores import FILE, SavedScores
from lowrank_cli.schema import AUTO, PruneConfig, PruneRun
from lowrank_cli.scoring.heatmaps import allocation, heat_map
from lowrank_cli.scoring.keep import keep_modules, keep_ranks, layer_and_role, module_cut, rank_cut
from lowrank_cli.scoring.rank_scores import Scores, require_ranks
from lowrank_cli.scoring.selection import SETTING, Selection, text
from lowrank_cli.session.session import Session
from lowrank_cli.stages.evaluate import evaluate_end
from lowrank_cli.stages.score import adapted, measure, write


def run(config: PruneRun, run: Run, adapter_run: Path | None, *, resume: bool = False) -> dict[str, float]:
    """Prune the adapter of ``config.run``, save it into ``run``'s folder, and return its metrics on dev and test."""
    source = Run.open(str(config.run))
    scoring = source if source.info["stage"] == "score" else None
    session, adapter = adapted(config, adapter_run)
    require_ranks(adapter)
    modules = config.level == "module"
    choose = keep_modules if modules else keep_ranks
    cut = (module_cut if modules else rank_cut)(config.prune, adapter, config.score.window)
    zeros = {key: [0.0] * rank for key, rank in adapter.ranks().items()}
    choose(config.prune, adapter, zeros)  # raises for an amount that does not fit, before anything slow
    scores = read(scoring, adapter, config.level, config.score.kind) if scoring else None
    session.greet(run)
    if scores is None:
        scores = measure(session, config.score, config.level, cut)
        write(run, adapter, scores)
    exact = scores.components.get("exact", zeros)
    if scoring and cut and session.accelerator.is_main_process and not cut.measured(scores.values, exact):
        progress.console().print(
            f"'{scoring.path}' measured exactly around another cut than this; near this one its scores are taylor's "
            f"(lrk prune run={scoring.config('run')['run']} score.kind=mixed measures here)",
            soft_wrap=True,
        )
    before = {"modules_before": len(adapter.modules), "ranks_before": sum(adapter.ranks().values())}
    keep = choose(config.prune, adapter, scores.values)
    figures = [write_selection(run, config, scoring or run, adapter, scores, keep)] if modules else []
    resize(adapter, {key: (ranks, 0) for key, ranks in keep.items()})
    _save(session, adapter, run)
    metrics, records, observed = evaluate_end(session, config.test)
    write_answers(run, records, [*figures, *observed.figures, allocation(adapter)])
    session.note_device(run)
    counts = {"modules": len(adapter.modules), "ranks": sum(adapter.ranks().values())}
    return {**metrics, **observed.metrics, **before, **counts}


def write_selection(
    run: Run, config: PruneRun, source: Run, adapter: Adapter, scores: Scores, keep: dict[str, list[int]]
) -> dict[str, Any]:
    """Write the selection file into ``run``'s folder and return a figure of it. Call it before resizing the adapter.

    The file lists every layer of the model, including those without a module.

    Args:
        source: the run that the scores came from.
        keep: what :func:`keep_modules` returned.
    """
    sites = layer_and_role(adapter)
    kept: dict[str, list[str]] = {str(layer): [] for layer in range(len(layers(adapter.model)))}
    for key, (layer, role) in sites.items():
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
    table = {site: scores.values[key][0] for key, site in sites.items()}
    selection = Selection(config.name or f"{scores.kind} {about['kept']}", kept)
    run.write_text(SETTING, text(selection, table, about, methods.having("setting")[0]))
    return heat_map(adapter, scores, [key for key, ranks in keep.items() if ranks]) | {"file": "setting.png"}


def _rule(settings: PruneConfig) -> str:
    """The settings by which modules were kept, such as ``keep=2``."""
    usual = {"per_layer": True, "same_roles": False}
    used = {key: value for key, value in vars(settings).items() if value is not None and value is not usual.get(key)}
    return " ".join(f"{key}={str(value).lower()}" for key, value in sorted(used.items()))


def _save(session: Session, adapter: Adapter, run: Run) -> None:
    """Save the pruned adapter, with what the unpruned one recorded about its training."""
    if session.accelerator.is_main_process:
        assert session.adapter_run is not None
        about = save_load.read_proof(session.adapter_run / "adapter")["about"]
        with atomic_folder(run.file("adapter")) as folder:
            save_load.save(adapter, folder, about)
    session.accelerator.wait_for_everyone()


def read(scoring: Run, adapter: Adapter, level: str, kind: str | None) -> Scores:
    """The scores that the run ``scoring`` of ``lrk score`` wrote.

    Raises:
        UserError: they are of another adapter, of another ``level``, or of another ``kind`` than requested.
    """
    saved = SavedScores.read(scoring.path)
    values = {entry["module"]: entry["scores"] for entry in saved.modules}
    exact = {entry["module"]: entry["exact"] for entry in saved.modules if "exact" in entry}
    parts = {"exact": exact} if len(exact) == len(values) else {}
    scores = Scores(saved.kind, values, parts, level=saved.level)
    scored_run = scoring.config("run")["run"]
    if scores.level != level:
        raise UserError(
            f"run: '{scoring.path}' scored {scores.level}s, but {level}s are to be taken out; "
            f"first: lrk score run={scored_run} score.level={level}"
        )
    if kind not in (None, AUTO, scores.kind):
        raise UserError(
            f"score.kind: '{kind}' is asked for, but '{scoring.path}' scored by '{scores.kind}' (leave score.kind out, "
            f"or name the adapter's run, which is scored first: run={scored_run})"
        )
    expected = adapter.ranks() if level == "rank" else dict.fromkeys(adapter.ranks(), 1)
    tables: list[Mapping[str, Sequence[float | None]]] = [values, *parts.values()]
    if any({key: len(row) for key, row in table.items()} != expected for table in tables):
        raise UserError(f"{scoring.path / FILE} does not belong to the adapter of {scored_run}")
    return scores
