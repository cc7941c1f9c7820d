"""``lrk evaluate``: predictions and metrics of a trained adapter, or of the frozen model, on one split of a task."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from lowrank_cli.icl import calibrate
from lowrank_cli.icl.demonstrations import draw
from lowrank_cli.icl.fit import load_or_fit
from lowrank_cli.inference import harness
from lowrank_cli.inference.predict import Record, predict, score, with_correct, write_answers
from lowrank_cli.methods.protocol import Calibrates, Diagnoses, Observes
from lowrank_cli.runs import Run, progress
from lowrank_cli.schema import EvaluateRun
from lowrank_cli.schema.harness import HarnessConfig
from lowrank_cli.session.adapter_run import check_template
from lowrank_cli.session.session import Session, load_adapter, start
from lowrank_cli.tasks.task import Example


@dataclass
class Observed:
    """The method's own report on the prompts of one evaluation."""

    metrics: dict[str, float] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)  #: signs that something is wrong

    def print_doubts(self) -> None:
        """Print the doubts, if any, on one line."""
        if self.doubts:
            progress.console().print("; ".join(self.doubts), soft_wrap=True)


def run(config: EvaluateRun, run: Run, adapter_run: Path | None, *, resume: bool = False) -> dict[str, float]:
    """Evaluate ``config.run``'s adapter (or none) and write ``predictions.jsonl`` into ``run``'s folder."""
    if config.eval is not None:
        return _measure_with_harness(config, config.eval, run, adapter_run)
    if adapter_run:
        check_template(config.task, adapter_run / "adapter")
    session = start(config, adapter_run)
    load_adapter(session)
    if isinstance(session.method, Calibrates):
        fitted = load_or_fit(session)
        calibrate.greet(session, run)
        metrics = calibrate.evaluate(session, run, fitted, config.evaluate.split)
        session.note_device(run)
        return metrics
    demonstrations(session)
    session.greet(run)
    metrics, records, observed = evaluate_split(session, config.evaluate.split)
    write_answers(run, records, observed.figures)
    session.note_device(run)
    if session.accelerator.is_main_process:
        observed.print_doubts()
    return {**metrics, **observed.metrics}


def _measure_with_harness(
    config: EvaluateRun, eval: HarnessConfig, run: Run, adapter_run: Path | None
) -> dict[str, float]:
    """The metrics of the lm-evaluation-harness; its full report is in ``lm_eval.json``."""
    tasks = harness.load_tasks(eval)  # before weights are read
    session = start(config, adapter_run)
    load_adapter(session)
    session.greet(run)
    report = harness.evaluate(session, eval, tasks)
    run.write_text("lm_eval.json", json.dumps(report, indent=2, default=str) + "\n")
    session.note_device(run)
    return {**harness.metrics(report), **parameters(session)}


def evaluate_split(session: Session, split: str) -> tuple[dict[str, float], list[Record], Observed]:
    """Metrics named ``<split>/<metric>``, the predictions, and what the method observed on this split."""
    examples = {"dev": session.task.dev, "test": session.task.test}[split]
    shown, shots = session.accelerator.is_main_process, demonstrations(session)
    records: list[Record] = [{}] * len(examples)
    observed: dict[str, tuple[int, Observed]] = {}
    _observe(session)  # resets what the method counted before
    with progress.bar(f"evaluating {split}", len(examples), shown=shown) as bar:
        for task in session.config.task.parts or ("",):
            indices = [index for index, example in enumerate(examples) if example.task == task]
            answers = predict(session, [examples[index] for index in indices], demonstrations=shots, tick=bar.advance)
            for index, record in zip(indices, answers, strict=True):
                records[index] = {**record, "index": index}
            observed[task] = len(indices), _observe(session)
    metrics = {f"{split}/{name}": value for name, value in score(session, records).items()}
    metrics[f"{split}/examples"] = len(examples)
    return {**metrics, **parameters(session)}, with_correct(session, records), _combine(observed)


def parameters(session: Session) -> dict[str, float]:
    """The numbers of parameters of the adapted model."""
    trainable = session.adapter.count() if session.adapter else 0
    total = session.model.num_parameters()
    return {"total_parameters": total, "trainable_parameters": trainable, "activated_parameters": trainable}


def evaluate_end(session: Session, test: bool) -> tuple[dict[str, float], list[Record], Observed]:
    """As :func:`evaluate_split` of dev, then of test if ``test``: all metrics; the rest is of the last split."""
    metrics, records, observed = evaluate_split(session, "dev")
    if test:
        test_metrics, records, observed = evaluate_split(session, "test")
        metrics |= test_metrics
    return metrics, records, observed


def _observe(session: Session) -> Observed:
    method, adapter = session.method, session.adapter
    if adapter is None or not isinstance(method, Observes):
        return Observed()
    observed = Observed(
        *method.observations(adapter, lambda counts: session.accelerator.reduce(counts, reduction="sum"))
    )
    doubt = method.diagnosis(observed.metrics) if isinstance(method, Diagnoses) else None
    return replace(observed, doubts=[doubt] if doubt else [])


def _combine(by_task: dict[str, tuple[int, Observed]]) -> Observed:
    """Observations over all tasks of a mix, given each task's number of examples and its observations.

    Metrics are means over the examples; heat maps that differ get a panel for each task.
    """
    counts, observed = zip(*by_task.values(), strict=True)
    first = observed[0]
    if len(by_task) == 1:
        return first
    metrics = {name: fmean([each.metrics[name] for each in observed], weights=counts) for name in first.metrics}
    figures = []
    for entries in zip(*(each.figures for each in observed), strict=True):
        figure = entries[0]
        if figure["kind"] == "heatmap" and any(other != figure for other in entries):
            panels = [{"title": name, "values": entry["values"]} for name, entry in zip(by_task, entries, strict=True)]
            figure = {**figure, "kind": "heatmaps", "panels": panels}
            del figure["values"]
        figures.append(figure)
    doubts = [f"{name}: {doubt}" for name, (_, each) in by_task.items() for doubt in each.doubts]
    return Observed(metrics, figures, doubts)


def demonstrations(session: Session) -> list[Example]:
    """``evaluate.shots`` training examples of each task, drawn with the run's seed, for all prompts."""
    drawn = []
    for task in session.config.task.parts or ("",):
        examples = [example for example in session.task.train if example.task == task]
        drawn += draw(examples, session.evaluate.shots, session.config.seed)
    return drawn
