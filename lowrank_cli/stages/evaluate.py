"""``lrk evaluate``: answers and metrics of a trained adapter, or of the frozen model, on one split of a task."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NotRequired, TypedDict

from lowrank_cli.adapter.files import save_load
from lowrank_cli.errors import UserError
from lowrank_cli.icl import calibrate
from lowrank_cli.icl.demonstrations import draw
from lowrank_cli.inference import progress
from lowrank_cli.inference.predict import predict, score, write_answers
from lowrank_cli.inference.session import Session, foundation, start
from lowrank_cli.methods.protocol import Calibrates, Diagnoses, Observes
from lowrank_cli.reader import check
from lowrank_cli.runs import Run
from lowrank_cli.schema import EvaluateRun, TaskConfig
from lowrank_cli.tasks.task import Example, template_hashes


@dataclass
class Observed:
    """What the method reports of itself over the prompts of one evaluation."""

    metrics: dict[str, float] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)  #: what the method finds wrong with it

    def tell(self) -> None:
        """Say in one line what is wrong, if something is."""
        if self.doubts:
            progress.console().print("; ".join(self.doubts), soft_wrap=True)


def run(config: EvaluateRun, run: Run, *, resume: bool = False) -> dict[str, float]:
    """Evaluate ``config.run``'s adapter (or none) and write ``predictions.jsonl`` into ``run``'s folder."""
    below = foundation(config)
    if below:
        check_template(config.task, below / "adapter")
    session = start(config)
    load_adapter(session)
    if isinstance(session.method, Calibrates):
        fitted = calibrate.obtain(session)
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
        observed.tell()
    return {**metrics, **observed.metrics}


def load_adapter(session: Session) -> None:
    """Fill the adapter from the run that holds its weights."""
    if session.adapter is not None:
        assert session.foundation is not None, "composition finds a run for every method that trains"
        save_load.load(session.adapter, session.foundation / "adapter")


class About(TypedDict):
    """What ``lrk.json`` says of the task that an adapter was trained on."""

    task: str
    template_hash: str
    parts: NotRequired[dict[str, str]]


def check_template(task: TaskConfig, folder: Path) -> None:
    """Refuse a task, or a part of a mix, that the adapter in ``folder`` was trained on with another prompt.

    Its numbers would say nothing about the adapter.
    """
    about = save_load.read_proof(folder)["about"]
    check(about, About, str(folder / save_load.PROOF), "about")
    trained = {about["task"]: about["template_hash"], **about.get("parts", {})}
    for name, now in template_hashes(task).items():
        if trained.get(name, now) != now:
            raise UserError(
                f"task.template: '{name}' was trained with another template or other label words "
                f"(hash {trained[name][:12]}, now {now[:12]}); leave them as they were"
            )


def evaluate_split(session: Session, split: str) -> tuple[dict[str, float], list[dict[str, Any]], Observed]:
    """Metrics named ``<split>/<metric>``, the predictions, and what the method observed on this split."""
    examples = {"dev": session.task.dev, "test": session.task.test}[split]
    shown, shots = session.accelerator.is_main_process, demonstrations(session)
    records: list[dict[str, Any]] = [{}] * len(examples)
    observed: dict[str, tuple[int, Observed]] = {}
    _observe(session)  # forget what came before
    with progress.bar(f"evaluating {split}", len(examples), shown=shown) as bar:
        for part in session.config.task.parts or ("",):
            own = [index for index, example in enumerate(examples) if example.part == part]
            answers = predict(session, [examples[index] for index in own], demonstrations=shots, tick=bar.advance)
            for index, record in zip(own, answers, strict=True):
                records[index] = {**record, "index": index}
            observed[part] = len(own), _observe(session)
    metrics = {f"{split}/{name}": value for name, value in score(session, records).items()}
    metrics[f"{split}/examples"] = len(examples)
    metrics["total_parameters"] = session.model.num_parameters()
    metrics["trainable_parameters"] = session.adapter.count() if session.adapter else 0
    metrics["activated_parameters"] = metrics["trainable_parameters"]
    return metrics, records, _together(observed)


def _observe(session: Session) -> Observed:
    method, adapter = session.method, session.adapter
    if adapter is None or not isinstance(method, Observes):
        return Observed()
    found = Observed(*method.observations(adapter, lambda counts: session.accelerator.reduce(counts, reduction="sum")))
    doubt = method.diagnosis(found.metrics) if isinstance(method, Diagnoses) else None
    return replace(found, doubts=[doubt] if doubt else [])


def _together(parts: dict[str, tuple[int, Observed]]) -> Observed:
    """What was observed on the parts of a mix (name: examples and what they showed): means over the examples, and
    figures that show each part by itself where they differ."""
    counts, observed = zip(*parts.values(), strict=True)
    first = observed[0]
    if len(parts) == 1:
        return first
    metrics = {name: fmean([own.metrics[name] for own in observed], weights=counts) for name in first.metrics}
    figures = []
    for entries in zip(*(own.figures for own in observed), strict=True):
        entry = entries[0]
        if entry["kind"] == "heatmap" and any(other != entry for other in entries):
            panels = [{"title": name, "values": own["values"]} for name, own in zip(parts, entries, strict=True)]
            entry = {**entry, "kind": "heatmaps", "panels": panels}
            del entry["values"]
        figures.append(entry)
    return Observed(metrics, figures, [f"{name}: {doubt}" for name, own in parts.items() for doubt in own[1].doubts])


def demonstrations(session: Session) -> list[Example]:
    """``evaluate.shots`` training examples, of a mix of each part, drawn by the run's seed, for all prompts."""
    found = []
    for part in session.config.task.parts or ("",):
        examples = [example for example in session.task.train if example.part == part]
        found += draw(examples, session.config.evaluate.shots, session.config.seed)
    return found
