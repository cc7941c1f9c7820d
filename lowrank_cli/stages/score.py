"""``lrk score``: what every rank of an adapter, or every module, is worth on a fixed batch of dev examples."""

from __future__ import annotations

import math
import time

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.inference import progress
from lowrank_cli.inference.session import Session, foundation, start
from lowrank_cli.runs import Run
from lowrank_cli.schema import AUTO, KINDS, RunConfig, ScoreConfig, ScoreRun
from lowrank_cli.scoring import cost, kinds, modules
from lowrank_cli.scoring.cut import Cut, usual
from lowrank_cli.scoring.heatmaps import heat_map
from lowrank_cli.scoring.kinds import Scores
from lowrank_cli.stages.evaluate import check_template, load_adapter

#: What the other numbers of ``scores.json`` are.
MEANINGS = {
    "whole": "S, that is minus the dev loss (nats), with the whole adapter",
    "bare": "S with no module of the adapter",
    "without": "S without this one; of it and the next, scores = whole - without + alone - bare",
    "alone": "S with this one and no other",
    "slope_at_1": "whole - without to first order: slope of S in the gate of this one, all gates open",
    "exact": "whole - without + alone - bare; null for those that are not near the cut",
    "slope_at_0": "alone - bare to first order: the same with all gates closed; by taylor scores are their sum",
}


def run(config: ScoreRun, run: Run, *, resume: bool = False) -> dict[str, float]:
    """Score the adapter of ``config.run`` and write ``scores.json`` and ``figures.json`` into ``run``'s folder."""
    session, adapter = adapted(config)
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


def adapted(config: RunConfig) -> tuple[Session, Adapter]:
    """The model with the adapter of the run that ``config`` reads. Raises UserError where there is none."""
    below = foundation(config)
    if below is None:
        raise UserError("run: the run has no adapter of its own, so there are no ranks")
    check_template(config.task, below / "adapter")
    session = start(config)
    load_adapter(session)
    assert session.adapter is not None
    return session, session.adapter


def measure(session: Session, settings: ScoreConfig, level: str, cut: Cut | None) -> Scores:
    """Scores of every rank or module, with a progress bar. The same for the same seed and settings.

    ``cut`` is where ``mixed`` is exact; None rules it out. Raises UserError where ``auto`` lacks a training to compare
    with, WorkFailed for a score that is no number, by which nothing can be ordered.
    """
    assert session.adapter is not None
    kind, adapter = settings.kind_of(level), session.adapter
    probe = session.probe(settings.batch, settings.tokens)
    reason = ""
    if kind == AUTO:
        kind, reason = cost.choose(cost.costs(adapter, level, probe, cut), trained_tokens(session))
        if session.accelerator.is_main_process:
            progress.console().print(reason, soft_wrap=True)
    rows = (modules if level == "module" else kinds).rows_to_run(kind, adapter, probe, cut)
    with progress.bar(f"scoring ({kind})", rows, shown=session.accelerator.is_main_process) as bar:
        probe.tick = bar.advance
        if level == "module":
            scores = modules.score(kind, adapter, probe, session.config.seed, cut)
        else:
            scores = kinds.score(kind, adapter, probe, cut)
    scores.reason = reason
    broken = [key for key, values in scores.values.items() if not all(map(math.isfinite, values))]
    if broken:
        raise WorkFailed(
            f"score.kind={kind}: the score of '{broken[0]}' is no finite number ({len(broken)} such modules)"
        )
    return scores


def trained_tokens(session: Session) -> int:
    """Tokens that were read by the training which made the adapter, or which last went on from it."""
    assert session.foundation is not None
    for run in Run.open(session.foundation).lineage():
        counted = [row["train/tokens"] for row in run.history() if "train/tokens" in row]
        if counted and counted[-1]:
            return counted[-1]
    raise UserError(
        f"score.kind: auto compares with the training of '{session.foundation}', whose history.jsonl counts no tokens "
        f"(allowed: the name of a kind; lrk list keys score)"
    )


def write(run: Run, adapter: Adapter, scores: Scores) -> None:
    """``scores.json`` with everything that was measured and what it means, and the heat map of each module's mean."""
    listed = []
    for key, values in scores.worth.items():
        site = adapter.sites[key]
        parts = {name: part[key] for name, part in scores.components.items()}
        listed.append({"module": key, "layer": site.layer, "role": site.role, "scores": values, **parts})
    losses = {} if scores.whole is None else {"whole": scores.whole, "bare": scores.bare}
    meaning = {"scores": KINDS[scores.level][scores.kind]} | {
        name: MEANINGS[name] for name in (*losses, *scores.components)
    }
    about = {"level": scores.level, "kind": scores.kind, "meaning": meaning}
    about |= {"reason": scores.reason} if scores.reason else {}
    run.write_json("scores.json", {**about, **losses, "modules": listed})
    run.write_json("figures.json", [heat_map(adapter, scores)])
