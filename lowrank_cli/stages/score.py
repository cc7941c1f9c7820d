"""``lrk score``: the worth of every rank, or module, of an adapter on a fixed batch of dev examples."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import cast

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.runs import Run, progress
from lowrank_cli.runs.scores import SavedScores, ScoredModule
from lowrank_cli.schema import AUTO, RunConfig, ScoreConfig, ScoreRun
from lowrank_cli.scoring import cost, module_scores, rank_scores
from lowrank_cli.scoring.cut import Cut, usual
from lowrank_cli.scoring.heatmaps import heat_map
from lowrank_cli.scoring.rank_scores import Scores
from lowrank_cli.session.adapter_run import check_template
from lowrank_cli.session.session import Session, load_adapter, start


def run(config: ScoreRun, run: Run, adapter_run: Path | None, *, resume: bool = False) -> dict[str, float]:
    """Score the adapter of ``config.run`` and write ``scores.json`` and ``figures.json`` into ``run``'s folder."""
    session, adapter = adapted(config, adapter_run)
    session.greet(run)
    began = time.monotonic()
    scores = measure(session, config.score, config.level, usual(adapter, config.level, config.score.window))
    seconds = time.monotonic() - began
    write(run, adapter, scores)
    session.note_device(run)
    losses = {"score/loss": scores.whole, "score/bare_loss": scores.bare}
    return {
        "score/ranks": sum(adapter.ranks().values()),
        "score/modules": len(adapter.modules),
        **{name: -value for name, value in losses.items() if value is not None},
        "score/seconds": seconds,
    }


def adapted(config: RunConfig, adapter_run: Path | None) -> tuple[Session, Adapter]:
    """A session with the adapter of ``adapter_run``, and that adapter. Raises UserError if there is none."""
    if adapter_run is None:
        raise UserError("run: the run has no adapter of its own, so there are no ranks")
    check_template(config.task, adapter_run / "adapter")
    session = start(config, adapter_run)
    load_adapter(session)
    assert session.adapter is not None
    return session, session.adapter


def measure(session: Session, settings: ScoreConfig, level: str, cut: Cut | None) -> Scores:
    """Scores of every rank or module, with a progress bar; deterministic given seed and settings.

    Args:
        level: ``rank`` or ``module``.
        cut: where ``mixed`` scores are exact; None rules them out.

    Raises:
        UserError: the kind is ``auto`` and the adapter has no training to compare the cost with.
        WorkFailed: a score is not finite.
    """
    assert session.adapter is not None
    kind, adapter = settings.kind_of(level), session.adapter
    probe = session.probe(settings.batch, settings.tokens)
    reason = ""
    if kind == AUTO:
        kind, reason = cost.choose(cost.costs(adapter, level, probe, cut), trained_tokens(session))
        if session.accelerator.is_main_process:
            progress.console().print(reason, soft_wrap=True)
    rows = (module_scores if level == "module" else rank_scores).rows_to_run(kind, adapter, probe, cut)
    with progress.bar(f"scoring ({kind})", rows, shown=session.accelerator.is_main_process) as bar:
        probe.tick = bar.advance
        if level == "module":
            scores = module_scores.score(kind, adapter, probe, session.config.seed, cut)
        else:
            scores = rank_scores.score(kind, adapter, probe, cut)
    scores.reason = reason
    broken = [key for key, values in scores.values.items() if not all(map(math.isfinite, values))]
    if broken:
        raise WorkFailed(
            f"score.kind={kind}: the score of '{broken[0]}' is not a finite number ({len(broken)} such modules)"
        )
    return scores


def trained_tokens(session: Session) -> int:
    """Tokens that the last training of the adapter read."""
    assert session.adapter_run is not None
    for run in Run.open(session.adapter_run).lineage():
        tokens = [row["train/tokens"] for row in run.history() if "train/tokens" in row]
        if tokens and tokens[-1]:
            return tokens[-1]
    raise UserError(
        f"score.kind: auto compares with the training of '{session.adapter_run}', whose history.jsonl counts no tokens "
        f"(allowed: the name of a kind; lrk list keys score)"
    )


def write(run: Run, adapter: Adapter, scores: Scores) -> None:
    """Write ``scores.json`` with all measurements, and a heat map of each module's mean score."""
    listed = []
    for key, values in scores.worth.items():
        site = adapter.sites[key]
        measured = {name: by_module[key] for name, by_module in scores.components.items()}
        entry = {"module": key, "layer": site.layer, "role": site.role, "scores": values, **measured}
        listed.append(cast(ScoredModule, entry))
    SavedScores(
        level=scores.level,
        kind=scores.kind,
        modules=listed,
        whole=scores.whole,
        bare=scores.bare,
        reason=scores.reason,
    ).save(run)
    run.write_json("figures.json", [heat_map(adapter, scores)])
