"""Answers of a model to examples: label words and letters are scored, free answers generated, encoders classify."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from lowrank_cli.schema import TaskConfig
from lowrank_cli.stages.session import Session
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example

Tick = Callable[[int], None]


def with_demonstrations(examples: Sequence[Example], demonstrations: Sequence[Example]) -> list[str]:
    """Each example's prompt behind the answered ``demonstrations``, a blank line between two."""
    shown = "".join(f"{example.prompt}{example.answer}\n\n" for example in demonstrations)
    return [shown + example.prompt for example in examples]


@torch.no_grad()
def predict(
    session: Session,
    examples: Sequence[Example],
    *,
    demonstrations: Sequence[Example] = (),
    tick: Tick = lambda count: None,
) -> list[dict[str, Any]]:
    """One record an example, in order: ``prediction``, ``references`` and what led to them. Shared by all processes."""
    evaluate, accelerator = session.config.evaluate, session.accelerator
    session.model.eval()
    prompts = with_demonstrations(examples, demonstrations)
    mine = range(accelerator.process_index, len(examples), accelerator.num_processes)
    order = sorted(mine, key=lambda index: len(prompts[index]))
    scored = [index for index in order if examples[index].choices]
    generated = [index for index in order if not examples[index].choices]
    records = []
    with session.autocast():
        for answer, part in ((_classify if session.encoder else _choose, scored), (_generate, generated)):
            for start in range(0, len(part), evaluate.batch_size):
                rows = part[start : start + evaluate.batch_size]
                batch = [examples[row] for row in rows]
                answers = answer(session, batch, [prompts[row] for row in rows], len(demonstrations))
                for row, example, found in zip(rows, batch, answers, strict=True):
                    mixed = {"task": example.part} if example.part else {}
                    asked = {"index": row, **mixed, "prompt": example.prompt}
                    records.append({**asked, **found, "references": example.references})
                tick(len(rows) * accelerator.num_processes)
    return sorted(gather_object(records), key=lambda record: record["index"])


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
        found |= {f"{name}/{metric}": value for metric, value in (of(part, own) if own else {}).items()}
    return {"mean": sum(found.values()) / len(found), **found}


def _classify(session: Session, batch: Sequence[Example], prompts: list[str], shots: int) -> Iterator[dict[str, Any]]:
    encoded = session.batch(session.encode(batch))
    del encoded["labels"]
    logits = session.model(**encoded).logits  # (B, labels)
    for example, row in zip(batch, logits, strict=True):
        choice = int(row[example.first : example.first + len(example.choices)].argmax())
        yield {"prediction": example.choices[choice].strip(), "label": example.label, "choice": choice}


def _generate(session: Session, batch: Sequence[Example], prompts: list[str], shots: int) -> Iterator[dict[str, Any]]:
    task, tokenizer = session.config.task, session.tokenizer
    room = session.room(shots) - task.max_new_tokens
    ids = [encode.encode_prompt(tokenizer, prompt, room) for prompt in prompts]
    inputs = {k: v.to(session.device) for k, v in encode.collate_prompts(ids, tokenizer.pad_token_id).items()}
    made = session.model.generate(
        **inputs,
        max_new_tokens=task.max_new_tokens,
        num_beams=session.config.evaluate.num_beams,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
    )
    texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for text in texts:
        yield {"prediction": text.split("\n\n")[0].strip() if shots else text.strip()}


def _choose(session: Session, batch: Sequence[Example], prompts: list[str], shots: int) -> Iterator[dict[str, Any]]:
    """Score every candidate answer by its tokens' summed log probability; the prompt is computed once for all."""
    tokenizer = session.tokenizer
    options = [
        ended(encode.candidates(tokenizer, prompt, example.choices), tokenizer.eos_token_id)
        for prompt, example in zip(prompts, batch, strict=True)
    ]
    room = session.room(shots)
    ids = [
        encode.encode_prompt(tokenizer, prompt, encode.prompt_room(choices, room))
        for prompt, choices in zip(prompts, options, strict=True)
    ]
    inputs = {k: v.to(session.device) for k, v in encode.collate_prompts(ids, tokenizer.pad_token_id).items()}
    scores = candidate_scores(session.model, inputs["input_ids"], inputs["attention_mask"], options)
    for example, row in zip(batch, scores, strict=True):
        choice = max(range(len(row)), key=row.__getitem__)
        yield {
            "prediction": example.choices[choice].strip(),
            "label": example.label,
            "choice": choice,
            "log_probabilities": [round(value, 5) for value in row],
        }


def ended(candidates: list[list[int]], eos: int) -> list[list[int]]:
    """The candidates, with EOS behind each where one is the beginning of another and would always score higher."""
    if any(a == b[: len(a)] for a in candidates for b in candidates if a is not b):
        return [[*candidate, eos] for candidate in candidates]
    return candidates


@torch.no_grad()
def candidate_scores(
    model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, options: list[list[list[int]]]
) -> list[list[float]]:
    """Σ log p of each candidate's tokens after its left-padded prompt (B, T).

    The prompts run once; where a candidate has more than one token, their KV cache is repeated for all C candidates
    and the rest runs in one more pass. Rows with fewer candidates are filled up and cut again.
    """
    most = max(map(len, options))
    longest = max(len(tokens) for row in options for tokens in row)
    device = input_ids.device
    tokens = torch.zeros(len(options), most, longest, dtype=torch.long, device=device)
    present = torch.zeros(len(options), most, longest, dtype=torch.bool, device=device)
    for b, row in enumerate(options):
        for c, candidate in enumerate(row):
            tokens[b, c, : len(candidate)] = torch.tensor(candidate, device=device)
            present[b, c, : len(candidate)] = True
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)  # (B, T)
    out = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=longest > 1,
        logits_to_keep=1,
    )
    first = out.logits[:, -1].float().log_softmax(dim=-1)  # (B, V)
    scores = first.gather(1, tokens[:, :, 0])  # (B, V), (B, C) -> (B, C)
    if longest > 1:
        cache = out.past_key_values
        cache.batch_repeat_interleave(most)
        rest = tokens[:, :, :-1].flatten(0, 1)  # (B, C, K) -> (B * C, K - 1)
        mask = torch.cat([attention_mask.repeat_interleave(most, dim=0), torch.ones_like(rest)], dim=1)
        after = positions[:, -1:].repeat_interleave(most, dim=0) + torch.arange(1, longest, device=device)
        logits = model(input_ids=rest, attention_mask=mask, position_ids=after, past_key_values=cache).logits
        later = logits.float().log_softmax(dim=-1).view(len(options), most, longest - 1, -1)  # (B, C, K - 1, V)
        scores_later = later.gather(3, tokens[:, :, 1:, None]).squeeze(3)  # (B, C, K - 1)
        scores = scores + (scores_later * present[:, :, 1:]).sum(dim=-1)
    return [scores[b, : len(row)].tolist() for b, row in enumerate(options)]
