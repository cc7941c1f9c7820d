"""In-context learning with a calibrating method: what it fits is kept, and answers are scored with it.

``fit`` reads the features of D under each wording of the task; ``evaluate`` asks every query behind each arrangement of
demonstrations (wording × set × order) and reports mean, spread and worst case. All arrangements share the model, and
all prompts of one arrangement share the KV cache of its demonstrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from lowrank_cli import methods, tasks
from lowrank_cli.adapter import state
from lowrank_cli.adapter.core import fingerprint
from lowrank_cli.calibration import store
from lowrank_cli.calibration.head import head_weight
from lowrank_cli.calibration.processor import AnswerProcessor
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Calibrates, Plan
from lowrank_cli.runs import Run, atomic_folder
from lowrank_cli.stages import demonstrations, progress, spread
from lowrank_cli.stages.candidates import Tick, answers, choice_scores, with_demonstrations
from lowrank_cli.stages.demonstrations import Arrangement
from lowrank_cli.stages.features import last_hidden
from lowrank_cli.stages.predict import choice, records, score, write_answers
from lowrank_cli.stages.session import Session
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example, Task, content_free

FOLDER = "statistics"  #: of a run: what was fitted
PROVED = 16  #: queries whose scores an export compares


@dataclass(frozen=True)
class Fitted:
    """What a method keeps of D, for each wording; ``seed`` drew D."""

    tensors: list[dict[str, Tensor]]
    seed: int


def train(session: Session, run: Run) -> dict[str, float]:
    """Fit, keep what was fitted in ``run``'s folder, and evaluate on dev and test."""
    session.greet()
    with progress.bar("fitting", _fit_size(session), shown=session.accelerator.is_main_process) as bar:
        fitted = fit(session, bar.advance)
    if session.accelerator.is_main_process:
        with atomic_folder(run.file(FOLDER)) as folder:
            store.save(folder, _flat(fitted), _about(session, fitted))
    session.accelerator.wait_for_everyone()
    metrics = evaluate(session, run, fitted, "dev") | evaluate(session, run, fitted, "test")
    session.note_device(run)
    return metrics


def fit(session: Session, tick: Tick = lambda count: None) -> Fitted:
    """The method's tensors of D under each wording."""
    method, seed = _calibrates(session), session.config.seed
    plan, found = method.plan(), []
    for task in wordings(session):
        examples = demonstrations.pool(task.train, plan, seed)
        features = last_hidden(session, [e.prompt + (e.answer if plan.answered else "") for e in examples], tick)
        found.append(method.fit(features, _labels(examples), len(task.label_words)))
    return Fitted(found, seed)


def fitted(session: Session) -> Fitted:
    """What ``config.run`` keeps, if a calibrating method made it; else fitted now, on the adapter of that run."""
    path = Path(session.config.run)
    if not methods.can(Run.open(path).config()["method"]["name"], Calibrates):
        return fit(session)
    tensors, about = store.load(path / FOLDER)
    now = _identity(session)
    for key, value in now.items():
        kept = about[key][: len(value)] if key == "templates" else about[key]
        if kept != value:
            raise UserError(
                f"run: the statistics of {path} were fitted with {key} {kept}, not {value}; fit them again with: "
                f"lrk train method={session.config.method.name} task={session.task.name}"
            )
    found: list[dict[str, Tensor]] = [{} for _ in about["templates"]]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        found[int(index)][key] = tensor
    return Fitted(found, about["seed"])


def export(session: Session, run: Run, max_error: float) -> dict[str, float]:
    """Write ``export/``, which :class:`AnswerProcessor` reads, once ``generate`` gives the scores of an evaluation."""
    with atomic_folder(run.file("export")) as folder:
        kept = fitted(session)
        store.save(folder, _flat(kept), _about(session, kept))
        error = _generate_error(session, kept, folder)
        if not error <= max_error:
            raise UserError(
                f"export.max_error: the scores of answers in generate differ by {error:.2g} of the largest (allowed: "
                f"{max_error:g}); what is exported is calibration=ida, without length normalisation"
            )
    return {"export/score_error": error}


@torch.no_grad()
def _generate_error(session: Session, kept: Fitted, folder: Path) -> float:
    """Largest difference of the best answers' scores between ``generate`` and an evaluation without demonstrations."""
    method, queries, tokenizer = _calibrates(session), session.task.test[:PROVED], session.tokenizer
    asked = Asked(session, method, method.plan(), session.task, kept.tensors[0], head_weight(session.model), kept.seed)
    records = asked.result(Arrangement(0, 0, 0), queries, 0).records
    expected = torch.tensor([max(record["log_probabilities"]) for record in records])  # (Q,)
    processor = AnswerProcessor.from_folder(folder, session.model, tokenizer.eos_token_id)
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


def wordings(session: Session) -> list[Task]:
    """The task under each template that the method asks for, the task's own first."""
    config, count = session.config.task, _calibrates(session).plan().templates
    if session.task.answer != "labels":
        raise UserError(
            f"task.answer: {session.task.name} has task.answer={session.task.answer}; calibration compares "
            f"label words (task.answer=labels)"
        )
    if count > 1 + len(config.templates):
        raise UserError(f"method.templates: {count}, but task={config.name} has {1 + len(config.templates)} of them")
    return [session.task, *(tasks.load(replace(config, template=text)) for text in config.templates[: count - 1])]


def evaluate(session: Session, run: Run, fitted: Fitted, split: str) -> dict[str, float]:
    """Metrics over all arrangements; ``arrangements.json``, ``predictions.jsonl`` (of the first) and figures."""
    method = _calibrates(session)
    results = evaluate_all(session, method, fitted, split)
    figures = [spread.confusion([r for result in results for r in result.records], session.task.label_words, split)]
    if len(results) > 1:
        figures.append(spread.box(results, split))
    for key, variants in method.variants().items():
        found = [evaluate_all(session, variant, fitted, split) for variant in variants.values()]
        figures.append(spread.curve(key, list(variants), found, split))
    write_answers(run, results[0].records, figures)
    run.write_json("arrangements.json", [result.summary for result in results])
    trained = session.adapter.count() if session.adapter else 0
    return {
        **spread.metrics(f"{split}/{results[0].metric}", [result.value for result in results]),
        f"{split}/examples": len(results[0].records),
        "arrangements": len(results),
        "total_parameters": sum(p.numel() for p in session.model.parameters()),
        "trainable_parameters": trained,
        "activated_parameters": trained,
    }


def evaluate_all(session: Session, method: Calibrates, fitted: Fitted, split: str) -> list[spread.Result]:
    """The result of each arrangement."""
    plan, shots = method.plan(), session.config.evaluate.shots
    head = head_weight(session.model)
    found = []
    ways = demonstrations.arrangements(plan, shots)
    shown = session.accelerator.is_main_process
    with progress.bar(f"evaluating {split}", len(ways), shown=shown) as bar:
        for index, task in enumerate(wordings(session)):
            asked = Asked(session, method, plan, task, fitted.tensors[index], head, fitted.seed)
            for way in (way for way in ways if way.template == index):
                found.append(asked.result(way, {"dev": task.dev, "test": task.test}[split], shots))
                bar.advance()
    return found


class Asked:
    """One wording of a task, asked behind any arrangement of demonstrations."""

    def __init__(
        self,
        session: Session,
        method: Calibrates,
        plan: Plan,
        task: Task,
        tensors: dict[str, Tensor],
        head: Tensor,
        seed: int,
    ):
        self.session, self.method, self.plan, self.task, self.tensors = session, method, plan, task, tensors
        self.examples = demonstrations.pool(task.train, plan, seed)
        self.rule = cache(lambda tokens: method.rule(tensors, head, tokens))  # the same answers: fitted once
        self.features = cache(lambda: last_hidden(session, [example.prompt for example in self.examples]))

    def result(self, way: Arrangement, queries: Sequence[Example], shots: int) -> spread.Result:
        """Answers to the queries."""
        probes = self._probes(way)
        asked = [*probes, *queries]
        prompts, picked = self._prompts(way, asked, shots)
        rows = choice_scores(
            self.session, asked, prompts, shots, rule_of=self.rule, normalize_length=self.plan.normalize_length
        )
        scores = torch.tensor(rows, dtype=torch.float64)  # (M + Q, C)
        calibrated = self.method.adjust(self.tensors, scores[: len(probes)], scores[len(probes) :])
        made = records(queries, [choice(query, row) for query, row in zip(queries, calibrated.tolist(), strict=True)])
        ((metric, value),) = score(self.session, made).items()
        return spread.Result(way, metric, value, picked, made)

    def _probes(self, way: Arrangement) -> list[Example]:
        texts, indices = self.method.probes(
            [" ".join(example.text) for example in self.examples], Random(f"{self.session.config.seed} {way.draw}")
        )
        return [*(content_free(self.task.config, text) for text in texts), *(self.examples[i] for i in indices)]

    def _prompts(self, way: Arrangement, asked: list[Example], shots: int) -> tuple[list[str], list[int] | None]:
        """Each prompt behind its demonstrations, and their indices in D where they are the same for all."""
        seed = self.session.config.seed
        if self.plan.choice not in ("similar", "dissimilar"):
            shown = demonstrations.chosen(self.plan, shots, way, self.examples, seed)
            return with_demonstrations(asked, shown), [self.examples.index(example) for example in shown]
        queries = last_hidden(self.session, [example.prompt for example in asked])
        picks = demonstrations.nearest(self.plan, shots, self.features(), queries)
        prompts = []
        for example, pick in zip(asked, picks, strict=True):
            shown = demonstrations.ordered([self.examples[index] for index in pick], way, seed)
            prompts += with_demonstrations([example], shown)
        return prompts, None


def _calibrates(session: Session) -> Calibrates:
    assert isinstance(session.method, Calibrates)
    return session.method


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.label for example in examples])


def _fit_size(session: Session) -> int:
    method = _calibrates(session)
    return len(demonstrations.pool(session.task.train, method.plan(), session.config.seed)) * method.plan().templates


def _flat(fitted: Fitted) -> dict[str, Tensor]:
    return {f"{index}.{key}": tensor for index, part in enumerate(fitted.tensors) for key, tensor in part.items()}


def _identity(session: Session) -> dict[str, Any]:
    """What fitted tensors belong to: other values would need other tensors."""
    plan = _calibrates(session).plan()
    proof = session.foundation / "adapter" / state.PROOF if session.foundation else None
    return {
        "fingerprint": session.adapter.fingerprint if session.adapter else fingerprint(session.model),
        "adapter": state.sha256(proof) if proof else None,
        "task": session.task.name,
        "templates": [task.config.template for task in wordings(session)],
        "label_words": list(session.task.label_words),
        "answered": plan.answered,
        "examples": plan.examples,
        "share": plan.share,
    }


def _about(session: Session, fitted: Fitted) -> dict[str, Any]:
    """What stands beside the tensors: enough to use them without this package's tasks."""
    return {
        **_identity(session),
        "model": session.config.model.name,
        "method": vars(session.config.method),
        "seed": fitted.seed,
        "answers": answers(session, session.task.test[0]),
    }
