"""``lrk train``, ``evaluate`` and ``export`` for methods that calibrate in-context learning.

:func:`train` fits and evaluates; :func:`evaluate` scores every query after each arrangement of demonstrations
(template × set × order) and reports mean, standard deviation and worst case. All arrangements share the model, all
prompts of one arrangement share the KV cache of its demonstrations, and curves over a setting share its forward passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank_cli.calibration.head import head_weight
from lowrank_cli.calibration.logits_processor import AnswerProcessor
from lowrank_cli.errors import UserError
from lowrank_cli.icl import arrangement_stats, demonstrations
from lowrank_cli.icl.arrangement_stats import Result
from lowrank_cli.icl.demonstrations import Arrangement
from lowrank_cli.icl.fit import FOLDER, Fitted, calibrating_method, fit, load_or_fit, save
from lowrank_cli.icl.queries import WordingScorer
from lowrank_cli.inference.choice_scores import answers
from lowrank_cli.inference.predict import score, with_correct, write_answers
from lowrank_cli.methods.protocol import Calibrates
from lowrank_cli.runs import Run, atomic_folder, progress
from lowrank_cli.session.session import Session
from lowrank_cli.tasks import encode

EXPORT_QUERIES = 16  #: queries whose scores an export compares


def train(session: Session, run: Run, test: bool) -> dict[str, float]:
    """Fit, save the fitted tensors into ``run``'s folder, and evaluate on dev and, if ``test``, on test."""
    greet(session, run)
    fitted = fit(session)
    if session.accelerator.is_main_process:
        with atomic_folder(run.file(FOLDER)) as folder:
            save(session, fitted, folder)
    session.accelerator.wait_for_everyone()
    if test:
        (dev,) = arrangement_results(session, [calibrating_method(session)], fitted, "dev")
        metrics = _metrics(session, dev, {}, "dev") | evaluate(session, run, fitted, "test")
    else:
        metrics = evaluate(session, run, fitted, "dev")
    session.note_device(run)
    return metrics


def greet(session: Session, run: Run) -> None:
    """Print the run's first line, and one for each option that has no effect."""
    session.greet(run)
    if session.accelerator.is_main_process:
        for line in demonstrations.unused_options(calibrating_method(session).plan(), session.evaluate.shots):
            progress.console().print(line)


def evaluate(session: Session, run: Run, fitted: Fitted, split: str) -> dict[str, float]:
    """Metrics over all arrangements.

    Writes ``arrangements.json``, ``predictions.jsonl`` (of the first arrangement) and ``figures.json``.
    """
    method = calibrating_method(session)
    curves, beside = method.variants(), method.beside()
    variants = [*beside.values(), *(variant for by_value in curves.values() for variant in by_value.values())]
    results, *others = arrangement_results(session, [method, *variants], fitted, split)
    of_beside, others = dict(zip(beside, others)), others[len(beside) :]
    if method.plan().oracles:
        words = [wording.task.label_words for wording in fitted.wordings]
        results = arrangement_stats.with_oracles(results, words, lambda rows: next(iter(score(session, rows).values())))
    figures = [arrangement_stats.confusion(results, session.task.label_words, split)]
    if len(results) > 1:
        figures.append(arrangement_stats.box(results, split))
    for key, by_value in curves.items():
        of_key, others = others[: len(by_value)], others[len(by_value) :]
        figures.append(arrangement_stats.curve(key, list(by_value), of_key, split))
    write_answers(run, _with_shares(session, results, of_beside), figures)
    run.write_json("arrangements.json", arrangement_stats.summaries(results, of_beside))
    return _metrics(session, results, of_beside, split)


def _with_shares(
    session: Session, results: Sequence[Result], beside: Mapping[str, Sequence[Result]]
) -> list[dict[str, Any]]:
    """The records of the first arrangement, each with the share of all arrangements that answer it correctly.

    ``correct_share`` is that of the method, where there are several; ``beside`` has those of the other calibrations.
    """

    def checked(of: Sequence[Result]) -> list[list[dict[str, Any]]]:
        return [with_correct(session, result.records) for result in of]

    def shares(of: Sequence[Sequence[dict[str, Any]]]) -> list[float] | None:
        correct = [[record.get("correct") for record in records] for records in of]
        if any(value is None for row in correct for value in row):
            return None
        return [sum(column) / len(column) for column in zip(*correct, strict=True)]

    answered = checked(results)
    lines = answered[0]
    if (own := shares(answered)) is not None:
        others = {name: shares(checked(of)) for name, of in beside.items()}
        for index, line in enumerate(lines):
            if len(results) > 1:
                line["correct_share"] = own[index]
            if others:
                line["beside"] = {name: values[index] for name, values in others.items() if values}
    return lines


def arrangement_results(
    session: Session, variants: Sequence[Calibrates], fitted: Fitted, split: str
) -> list[list[Result]]:
    """For each variant of a method, the result of each arrangement. The model runs once for all variants."""
    plan, shots = variants[0].plan(), session.evaluate.shots
    head = head_weight(session.model)
    results: list[list[Result]] = [[] for _ in variants]
    arrangements = demonstrations.arrangements(plan, shots)
    shown = session.accelerator.is_main_process
    with progress.bar(f"evaluating {split}", len(arrangements), shown=shown) as bar:
        for index, wording in enumerate(fitted.wordings[: plan.templates]):
            scorer = WordingScorer(session, variants, wording, head, fitted.seed)
            queries = {"dev": wording.task.dev, "test": wording.task.test}[split]
            for arrangement in arrangements:
                if arrangement.template == index:
                    for of_variant, result in zip(results, scorer.results(arrangement, queries, shots), strict=True):
                        of_variant.append(result)
                    bar.advance()
    return results


def _metrics(
    session: Session, results: Sequence[Result], beside: Mapping[str, Sequence[Result]], split: str
) -> dict[str, float]:
    trained, metric = session.adapter.count() if session.adapter else 0, f"{split}/{results[0].metric}"
    others = {name: [result.oracles[name] for result in results] for name in results[0].oracles}
    others |= {name: [result.value for result in of] for name, of in beside.items()}
    measured = arrangement_stats.metrics(metric, [result.value for result in results])
    for name, values in others.items():
        measured |= arrangement_stats.metrics(f"{metric}_{name}", values)
    return {
        **measured,
        f"{split}/examples": len(results[0].records),
        "arrangements": len(results),
        "probes": results[0].probes,
        "total_parameters": session.model.num_parameters(),
        "trainable_parameters": trained,
        "activated_parameters": trained,
    }


def export(session: Session, run: Run, max_error: float) -> dict[str, float]:
    """Write ``export/``, which :class:`AnswerProcessor` reads.

    Raises:
        UserError: with it, ``generate`` gives scores that differ from an evaluation's by more than ``max_error`` of the
            largest.
    """
    with atomic_folder(run.file("export")) as folder:
        fitted = load_or_fit(session)
        save(session, fitted, folder)
        error = _generate_error(session, fitted, folder)
        if not error <= max_error:
            raise UserError(
                f"export.max_error: the scores of answers in generate differ by {error:.2g} of the largest (allowed: "
                f"{max_error:g})"
            )
    return {"export/score_error": error}


@torch.no_grad()
def _generate_error(session: Session, fitted: Fitted, folder: Path) -> float:
    """Largest difference in the best answers' scores between ``generate`` and an evaluation without demonstrations."""
    queries, tokenizer = session.task.test[:EXPORT_QUERIES], session.tokenizer
    processor = AnswerProcessor.from_folder(folder, session.model, tokenizer.eos_token_id)
    method, head = calibrating_method(session), head_weight(session.model)
    scorer = WordingScorer(session, [method], fitted.wordings[0], head, fitted.seed)
    (result,) = scorer.results(Arrangement(0, 0, 0), queries, 0)
    expected = torch.tensor([max(record["scores"]) for record in result.records])  # (Q,)
    longest = max(len(answer) for answer in answers(session, queries[0])) + 1
    limits = [session.max_length() - longest] * len(queries)
    rows = encode.encode_prompts(tokenizer, [query.prompt for query in queries], limits)
    batch = encode.collate_prompts(rows, tokenizer.pad_token_id)
    generated = session.model.generate(  # type: ignore[operator]  # not declared by PreTrainedModel
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
    error = (generated.sequences_scores.float().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    return error.item()
