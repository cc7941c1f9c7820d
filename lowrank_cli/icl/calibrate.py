"""In-context learning with a calibrating method: what it fits is kept, and answers are scored with it.

``fit`` reads the features of D under each wording of the task; ``evaluate`` asks every query behind each arrangement of
demonstrations (wording × set × order) and reports mean, spread and worst case. All arrangements share the model, all
prompts of one arrangement share the KV cache of its demonstrations, and the curves over a setting share its passes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_cli import tasks
from lowrank_cli.adapter.adapted_model import fingerprint
from lowrank_cli.adapter.files import save_load
from lowrank_cli.calibration import statistics_files
from lowrank_cli.calibration.head import head_weight
from lowrank_cli.calibration.logits_processor import AnswerProcessor
from lowrank_cli.errors import UserError
from lowrank_cli.icl import arrangement_stats, demonstrations
from lowrank_cli.icl.demonstrations import Arrangement
from lowrank_cli.icl.hidden_states import last_hidden
from lowrank_cli.icl.queries import Asked, Wording
from lowrank_cli.inference import progress
from lowrank_cli.inference.choice_scores import answers
from lowrank_cli.inference.predict import write_answers
from lowrank_cli.inference.session import Session, method_of
from lowrank_cli.methods.protocol import Calibrates
from lowrank_cli.runs import Run, atomic_folder
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example, Task

FOLDER = "statistics"  #: of a run: what was fitted
PROVED = 16  #: queries whose scores an export compares


@dataclass(frozen=True)
class Fitted:
    """What a method keeps, the task's own template first; ``seed`` drew D."""

    wordings: list[Wording]
    seed: int


def train(session: Session, run: Run) -> dict[str, float]:
    """Fit, keep what was fitted in ``run``'s folder, and evaluate on dev and test."""
    greet(session, run)
    fitted = fit(session)
    if session.accelerator.is_main_process:
        with atomic_folder(run.file(FOLDER)) as folder:
            statistics_files.save(folder, _flat(fitted), _about(session, fitted))
    session.accelerator.wait_for_everyone()
    (dev,) = arranged(session, [_calibrates(session)], fitted, "dev")
    metrics = _metrics(session, dev, "dev") | evaluate(session, run, fitted, "test")
    session.note_device(run)
    return metrics


def greet(session: Session, run: Run) -> None:
    """The run's first line, and one for each option that has no effect."""
    session.greet(run)
    if session.accelerator.is_main_process:
        for line in demonstrations.idle(_calibrates(session).plan(), session.config.evaluate.shots):
            progress.console().print(line)


def fit(session: Session) -> Fitted:
    """The method's tensors of D under each wording."""
    method, seed = _calibrates(session), session.config.seed
    plan, tasks = method.plan(), _worded(session)
    pools = [demonstrations.pool(task.train, plan, seed) for task in tasks]
    found = []
    with progress.bar("fitting", sum(map(len, pools)), shown=session.accelerator.is_main_process) as bar:
        for task, examples in zip(tasks, pools, strict=True):
            texts = [e.prompt + (e.answer if plan.answered else "") for e in examples]
            features = last_hidden(session, texts, bar.advance)
            found.append(Wording(task, method.fit(features, _labels(examples), len(task.label_words))))
    return Fitted(found, seed)


def obtain(session: Session) -> Fitted:
    """What ``config.run`` keeps, if a calibrating method made it; else fitted now, on the adapter of that run."""
    path = Path(session.config.run)
    if not isinstance(method_of(Run.open(path)), Calibrates):
        return fit(session)
    tensors, about = statistics_files.load(path / FOLDER)
    for key, value in _identity(session, about["seed"]).items():
        kept = about[key][: len(value)] if key == "templates" else about[key]
        if kept != value:
            config = session.config
            task = {"max_length": f" task.max_length={value}", "data": f" task.limit={config.task.limit or 'null'}"}
            raise UserError(
                f"run: the statistics of {path} were fitted with {key} {kept}, not {value}; fit them again with: "
                f"lrk train method={config.method.name} model={config.model.name} task={config.task.name} "
                f"method.templates={len(_templates(session))}{task.get(key, '')}"
            )
    found: list[dict[str, Tensor]] = [{} for _ in about["templates"]]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if not (index.isdecimal() and int(index) < len(found)):
            raise UserError(f"{path / FOLDER}: the tensor '{name}' belongs to none of the {len(found)} templates")
        found[int(index)][key] = tensor
    return Fitted([Wording(task, part) for task, part in zip(_worded(session), found)], about["seed"])


def export(session: Session, run: Run, max_error: float) -> dict[str, float]:
    """Write ``export/``, which :class:`AnswerProcessor` reads, once ``generate`` gives the scores of an evaluation."""
    with atomic_folder(run.file("export")) as folder:
        kept = obtain(session)
        statistics_files.save(folder, _flat(kept), _about(session, kept))
        error = _generate_error(session, kept, folder)
        if not error <= max_error:
            raise UserError(
                f"export.max_error: the scores of answers in generate differ by {error:.2g} of the largest (allowed: "
                f"{max_error:g})"
            )
    return {"export/score_error": error}


@torch.no_grad()
def _generate_error(session: Session, kept: Fitted, folder: Path) -> float:
    """Largest difference of the best answers' scores between ``generate`` and an evaluation without demonstrations."""
    queries, tokenizer = session.task.test[:PROVED], session.tokenizer
    processor = AnswerProcessor.from_folder(folder, session.model, tokenizer.eos_token_id)
    asked = Asked(session, [_calibrates(session)], kept.wordings[0], head_weight(session.model), kept.seed)
    (result,) = asked.results(Arrangement(0, 0, 0), queries, 0)
    expected = torch.tensor([max(record["scores"]) for record in result.records])  # (Q,)
    longest = max(len(answer) for answer in answers(session, queries[0])) + 1
    rows = encode.encode_prompts(tokenizer, [q.prompt for q in queries], [session.room() - longest] * len(queries))
    batch = encode.collate_prompts(rows, tokenizer.pad_token_id)
    made = session.model.generate(
        **{key: value.to(session.device) for key, value in batch.items()},
        logits_processor=[processor],
        num_beams=processor.beams,
        length_penalty=0.0,
        max_new_tokens=longest,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    error = (made.sequences_scores.float().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    return error.item()


def evaluate(session: Session, run: Run, fitted: Fitted, split: str) -> dict[str, float]:
    """Metrics over all arrangements; ``arrangements.json``, ``predictions.jsonl`` (of the first) and figures."""
    method = _calibrates(session)
    curves = method.variants()
    varied = [variant for variants in curves.values() for variant in variants.values()]
    results, *others = arranged(session, [method, *varied], fitted, split)
    figures = [arrangement_stats.confusion(results, session.task.label_words, split)]
    if len(results) > 1:
        figures.append(arrangement_stats.box(results, split))
    for key, variants in curves.items():
        found, others = others[: len(variants)], others[len(variants) :]
        figures.append(arrangement_stats.curve(key, list(variants), found, split))
    write_answers(run, results[0].records, figures)
    run.write_json("arrangements.json", [result.summary for result in results])
    return _metrics(session, results, split)


def arranged(
    session: Session, variants: Sequence[Calibrates], fitted: Fitted, split: str
) -> list[list[arrangement_stats.Result]]:
    """For each variant of a method the result of each arrangement; the model runs once for all variants."""
    plan, shots = variants[0].plan(), session.config.evaluate.shots
    head = head_weight(session.model)
    found: list[list[arrangement_stats.Result]] = [[] for _ in variants]
    ways = demonstrations.arrangements(plan, shots)
    shown = session.accelerator.is_main_process
    with progress.bar(f"evaluating {split}", len(ways), shown=shown) as bar:
        for index, wording in enumerate(fitted.wordings[: plan.templates]):
            asked = Asked(session, variants, wording, head, fitted.seed)
            queries = {"dev": wording.task.dev, "test": wording.task.test}[split]
            for way in (way for way in ways if way.template == index):
                for results, result in zip(found, asked.results(way, queries, shots), strict=True):
                    results.append(result)
                bar.advance()
    return found


def _metrics(session: Session, results: Sequence[arrangement_stats.Result], split: str) -> dict[str, float]:
    trained = session.adapter.count() if session.adapter else 0
    return {
        **arrangement_stats.metrics(f"{split}/{results[0].metric}", [result.value for result in results]),
        f"{split}/examples": len(results[0].records),
        "arrangements": len(results),
        "total_parameters": session.model.num_parameters(),
        "trainable_parameters": trained,
        "activated_parameters": trained,
    }


def _templates(session: Session) -> list[str]:
    """The templates that the method asks for, the task's own first."""
    config, count = session.config.task, _calibrates(session).plan().templates
    return [config.template, *config.templates[: count - 1]]


def _worded(session: Session) -> list[Task]:
    """The task under each template."""
    others = [replace(session.config.task, template=text) for text in _templates(session)[1:]]
    return [session.task, *map(tasks.load, others)]


def _calibrates(session: Session) -> Calibrates:
    assert isinstance(session.method, Calibrates)
    return session.method


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.label for example in examples])


def _flat(fitted: Fitted) -> dict[str, Tensor]:
    wordings = enumerate(fitted.wordings)
    return {f"{index}.{key}": tensor for index, wording in wordings for key, tensor in wording.tensors.items()}


def _identity(session: Session, seed: int) -> dict[str, Any]:
    """What fitted tensors belong to: other values would need other tensors."""
    plan, templates = _calibrates(session).plan(), _templates(session)
    proof = session.foundation / "adapter" / save_load.PROOF if session.foundation else None
    return {
        "fingerprint": session.adapter.fingerprint if session.adapter else fingerprint(session.model),
        "adapter": save_load.sha256(proof) if proof else None,
        "task": session.task.name,
        "templates": templates,
        "label_words": list(session.task.label_words),
        "answered": plan.answered,
        "examples": plan.examples,
        "share": plan.share,
        "max_length": session.config.task.max_length,
        "data": _data(demonstrations.pool(session.task.train, plan, seed)),
    }


def _data(examples: Sequence[Example]) -> str:
    """Names D: how many examples, and a hash of what they say."""
    said = json.dumps([(example.prompt, example.answer) for example in examples]).encode()
    return f"{len(examples)} examples ({hashlib.sha256(said).hexdigest()[:16]})"


def _about(session: Session, fitted: Fitted) -> dict[str, Any]:
    """What stands beside the tensors: enough to use them without this package's tasks."""
    return {
        **_identity(session, fitted.seed),
        "model": session.config.model.name,
        "vocabulary": head_weight(session.model).shape[0],
        "method": vars(session.config.method),
        "seed": fitted.seed,
        "answers": answers(session, session.task.test[0]),
    }
