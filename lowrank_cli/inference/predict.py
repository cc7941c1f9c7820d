"""Answers of a model to examples: label words and letters are scored, free answers generated, encoders classify."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from lowrank_cli.adapter.kv_cache import growing_cache
from lowrank_cli.inference.choice_scores import Tick, choice_scores, with_demonstrations
from lowrank_cli.inference.session import Session
from lowrank_cli.runs import Run
from lowrank_cli.schema import TaskConfig
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example


@torch.no_grad()
def predict(
    session: Session,
    examples: Sequence[Example],
    *,
    demonstrations: Sequence[Example],
    tick: Tick = lambda count: None,
) -> list[dict[str, Any]]:
    """One record an example, in order: ``prediction``, ``references`` and what led to them. Shared by all processes."""
    prompts, shots = with_demonstrations(examples, demonstrations), session.config.evaluate.shots
    scored = [index for index, example in enumerate(examples) if example.choices and not session.encoder]
    found: dict[int, dict[str, Any]] = {}
    if scored:
        asked = [examples[index] for index in scored]
        scores = choice_scores(session, asked, [prompts[index] for index in scored], shots, tick=tick)
        found = {index: choice(examples[index], row) for index, row in zip(scored, scores, strict=True)}
    others = [index for index in range(len(examples)) if index not in found]
    found |= _in_batches(session, examples, prompts, others, shots, tick)
    return records(examples, [found[index] for index in range(len(examples))])


def records(examples: Sequence[Example], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``predictions.jsonl`` holds."""
    return [
        {
            "index": index,
            **({"task": example.part} if example.part else {}),
            "prompt": example.prompt,
            **answer,
            "references": example.references,
        }
        for index, (example, answer) in enumerate(zip(examples, found, strict=True))
    ]


def choice(example: Example, scores: Sequence[float]) -> dict[str, Any]:
    """The choice of the highest score."""
    best = max(range(len(scores)), key=scores.__getitem__)
    return {
        "prediction": example.choices[best].strip(),
        "label": example.label,
        "choice": best,
        "scores": [round(value, 5) for value in scores],
    }


def score(session: Session, records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The task's metric of :func:`predict`'s records; of a mix each part's, ``<part>/<metric>``, and their ``mean``."""
    from lowrank_cli.tasks import metrics  # importing evaluate takes seconds

    def of(task: TaskConfig, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        predictions = [record["prediction"] for record in records]
        references = [list(record["references"]) for record in records]
        return metrics.compute(task.metric, predictions, references, extract=task.extract)

    task = session.config.task
    if not task.parts:
        return of(task, records)
    found = {}
    for name, part in task.parts.items():
        own = [record for record in records if record["task"] == name]
        found |= {f"{name}/{metric}": value for metric, value in of(part, own).items()}
    return {"mean": sum(found.values()) / len(found), **found}


def write_answers(run: Run, records: list[dict[str, Any]], figures: list[dict[str, Any]]) -> None:
    """``predictions.jsonl``, and ``figures.json`` where there is something to draw."""
    run.write_text("predictions.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    if figures:
        run.write_json("figures.json", figures)


def _in_batches(
    session: Session, examples: Sequence[Example], prompts: Sequence[str], wanted: list[int], shots: int, tick: Tick
) -> dict[int, dict[str, Any]]:
    """Answers that are generated or classified, in batches of alike lengths; for all processes."""
    accelerator, size = session.accelerator, session.config.evaluate.batch_size
    session.model.eval()
    mine = wanted[accelerator.process_index :: accelerator.num_processes]
    answer = _classify if session.encoder else _generate
    found: list[tuple[int, dict[str, Any]]] = []
    with session.autocast():
        for part in dict.fromkeys(examples[i].part for i in mine):  # a batch has one length of answers
            order = sorted((i for i in mine if examples[i].part == part), key=lambda i: len(prompts[i]))
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                answers = answer(session, [examples[row] for row in rows], [prompts[row] for row in rows], shots)
                found += zip(rows, answers, strict=True)
                tick(len(rows) * accelerator.num_processes)
    return dict(gather_object(found))


def _classify(session: Session, batch: Sequence[Example], prompts: list[str], shots: int) -> Iterator[dict[str, Any]]:
    encoded = session.batch(session.encode(batch))
    del encoded["labels"]
    logits = session.model(**encoded).logits  # (B, labels)
    for example, row in zip(batch, logits, strict=True):
        choice = int(row[example.first : example.first + len(example.choices)].argmax())
        yield {"prediction": example.choices[choice].strip(), "label": example.label, "choice": choice}


def _generate(session: Session, batch: Sequence[Example], prompts: list[str], shots: int) -> Iterator[dict[str, Any]]:
    tokenizer, part = session.tokenizer, batch[0].part
    most = session.new_tokens(part)
    room = session.room(shots, part) - most
    ids = [encode.encode_prompt(tokenizer, prompt, room) for prompt in prompts]
    inputs = {k: v.to(session.device) for k, v in encode.collate_prompts(ids, tokenizer.pad_token_id).items()}
    beams = session.config.evaluate.num_beams
    made = session.model.generate(
        **inputs,
        **(growing_cache(session.model, most) if beams == 1 else {}),
        max_new_tokens=most,
        num_beams=beams,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
    )
    texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for text in texts:
        yield {"prediction": text.split("\n\n")[0].strip() if shots else text.strip()}
