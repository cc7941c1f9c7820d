"""Predictions for examples: label words and letters are scored, free answers generated, encoders classify."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

import torch

from lowrank_cli.adapter.kv_cache import growing_cache
from lowrank_cli.inference.choice_scores import Tick, choice_scores, with_demonstrations
from lowrank_cli.runs import Run
from lowrank_cli.schema import TaskConfig
from lowrank_cli.session.session import Session
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example, answer_text

Record = dict[str, Any]  #: a line of ``predictions.jsonl``


@torch.no_grad()
def predict(
    session: Session,
    examples: Sequence[Example],
    *,
    demonstrations: Sequence[Example],
    tick: Tick = lambda count: None,
) -> list[Record]:
    """A record for each example, in order: ``prediction``, ``references`` and more. Every process must call this.

    ``tick`` is called with the number of examples done since the last call.
    """
    prompts, shots = with_demonstrations(examples, demonstrations), session.evaluate.shots
    scored = [index for index, example in enumerate(examples) if example.choices and not session.encoder]
    predictions: dict[int, Record] = {}
    if scored:
        scores = choice_scores(session, [examples[i] for i in scored], [prompts[i] for i in scored], shots, tick=tick)
        predictions = {index: choice(examples[index], row) for index, row in zip(scored, scores, strict=True)}
    others = [index for index in range(len(examples)) if index not in predictions]
    predictions |= _in_batches(session, examples, prompts, others, shots, tick)
    return records(examples, [predictions[index] for index in range(len(examples))])


def records(examples: Sequence[Example], predictions: Sequence[Record]) -> list[Record]:
    """The lines of ``predictions.jsonl``."""
    return [
        {
            "index": index,
            **({"task": example.task} if example.task else {}),
            "prompt": example.prompt,
            **prediction,
            "references": example.references,
        }
        for index, (example, prediction) in enumerate(zip(examples, predictions, strict=True))
    ]


def choice(example: Example, scores: Sequence[float]) -> Record:
    """The choice with the highest score."""
    best = max(range(len(scores)), key=scores.__getitem__)
    return {
        "prediction": example.choices[best].strip(),
        "label": example.label,
        "choice": best,
        "scores": [round(value, 5) for value in scores],
    }


def score(session: Session, records: Sequence[Record]) -> dict[str, float]:
    """The task's metrics over ``records``; for a mix ``<task>/<metric>`` of each, and the ``mean`` of their own."""
    from lowrank_cli.tasks import metrics  # importing evaluate takes seconds

    def compute(task: TaskConfig, records: Sequence[Record]) -> dict[str, float]:
        predictions = [record["prediction"] for record in records]
        references = [list(record["references"]) for record in records]
        values: dict[str, float] = {}
        for name in (task.metric, *task.more_metrics):
            values |= metrics.compute(name, predictions, references, task.extract, task.label_words)
        return values

    config = session.config.task
    if not config.parts:
        return compute(config, records)
    values: dict[str, float] = {}
    for name, task in config.parts.items():
        of_task = compute(task, [record for record in records if record["task"] == name])
        values |= {f"{name}/{metric}": value for metric, value in of_task.items()}
    return {"mean": fmean(values[f"{name}/{task.metric}"] for name, task in config.parts.items()), **values}


def with_correct(session: Session, records: Sequence[Record]) -> list[Record]:
    """The records, each with ``correct`` where its task's metric is a share of correct answers."""
    from lowrank_cli.tasks import metrics  # importing evaluate takes seconds

    config = session.config.task
    result = list(records)
    for name, task in (config.parts or {"": config}).items():
        indices = [index for index, record in enumerate(records) if record.get("task", "") == name]
        own = [records[index] for index in indices]
        references = [list(record["references"]) for record in own]
        correct = metrics.correct(task.metric, [record["prediction"] for record in own], references, task.extract)
        for index, one in zip(indices, correct or (), strict=correct is not None):
            result[index] = {**records[index], "correct": one}
    return result


def write_answers(run: Run, records: list[Record], figures: list[dict[str, Any]]) -> None:
    """Write ``predictions.jsonl``, and ``figures.json`` if there are figures."""
    run.write_text("predictions.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    if figures:
        run.write_json("figures.json", figures)


def _in_batches(
    session: Session, examples: Sequence[Example], prompts: Sequence[str], indices: list[int], shots: int, tick: Tick
) -> dict[int, Record]:
    """Generated or classified answers to ``examples[i]`` for i in ``indices``, in batches of similar lengths."""
    accelerator, size = session.accelerator, session.evaluate.batch_size
    session.model.eval()
    mine = indices[accelerator.process_index :: accelerator.num_processes]
    answer: Callable[..., Iterator[Record]] = _classify if session.encoder else _generate
    predictions: list[tuple[int, Record]] = []
    with session.autocast():
        for task in dict.fromkeys(examples[i].task for i in mine):  # a batch has one length of answers
            order = sorted((i for i in mine if examples[i].task == task), key=lambda i: len(prompts[i]))
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                answers = answer(session, [examples[row] for row in rows], [prompts[row] for row in rows], shots)
                predictions += zip(rows, answers, strict=True)
                tick(len(rows) * accelerator.num_processes)
    return dict(accelerator.gather_object(predictions))


def _classify(session: Session, batch: Sequence[Example], prompts: list[str], shots: int) -> Iterator[Record]:
    encoded = session.encode(batch)
    inputs = session.batch(encoded)
    del inputs["labels"]
    logits = session.model(**inputs).logits.float()  # (B, labels), or (B, T, labels) of tags
    task = session.config.task
    for example, tokens, row in zip(batch, encoded, logits, strict=True):
        if example.choices:
            choice = int(row[example.first : example.first + len(example.choices)].argmax())
            yield {"prediction": example.choices[choice].strip(), "label": example.label, "choice": choice}
        elif task.answer == "number":
            yield {"prediction": answer_text(task, row.item())}
        elif task.answer == "multi_label":
            yield {"prediction": answer_text(task, tuple(row.gt(0).nonzero()[:, 0].tolist()))}
        else:
            tags, cut = row.argmax(dim=-1).tolist(), _outside(task)
            yield {"prediction": answer_text(task, tuple(cut if at is None else tags[at] for at in tokens.words))}


def _outside(task: TaskConfig) -> int:
    """The tag of words that ``task.max_length`` leaves out: ``O`` if there is one, else the first."""
    return task.label_words.index("O") if "O" in task.label_words else 0


def _generate(session: Session, batch: Sequence[Example], prompts: list[str], shots: int) -> Iterator[Record]:
    tokenizer, task = session.prompt_tokenizer, batch[0].task
    new_tokens = session.max_new_tokens(task)
    limit = session.max_length(shots, task) - new_tokens
    ids = [encode.encode_prompt(tokenizer, prompt, limit) for prompt in prompts]
    inputs = {k: v.to(session.device) for k, v in encode.collate_prompts(ids, tokenizer.pad_token_id).items()}
    beams = session.evaluate.num_beams
    generated = session.model.generate(  # type: ignore[operator]  # not declared by PreTrainedModel
        **inputs,
        **(growing_cache(session.model, new_tokens) if beams == 1 else {}),
        max_new_tokens=new_tokens,
        num_beams=beams,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=session.stops(task),
        use_cache=True,
        synced_gpus=False,  # processes wait for each other where they gather the answers
    )
    texts = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for text in texts:
        yield {"prediction": text.split("\n\n")[0].strip() if shots else text.strip()}
