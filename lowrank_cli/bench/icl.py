"""``lrk bench icl``: what it costs to answer queries in context, and what a calibrating method adds.

``base`` scores the answers by their log probabilities, the KV cache of the demonstrations computed once; ``whole
prompts`` runs every prompt with every answer, nothing shared. A method is measured with everything that it does for a
set of queries, probes and precomputation included; its fit, done once, is timed by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lowrank_cli import methods
from lowrank_cli.bench.rounds import interleaved
from lowrank_cli.bench.timings import figures, metrics, rows, timed
from lowrank_cli.calibration.head import head_weight
from lowrank_cli.calibration.ida import log_softmax
from lowrank_cli.icl.demonstrations import Arrangement, draw
from lowrank_cli.icl.fit import Fitted, fit
from lowrank_cli.icl.queries import WordingScorer
from lowrank_cli.inference.choice_scores import answers, choice_scores, with_demonstrations
from lowrank_cli.methods.protocol import Calibrates
from lowrank_cli.runs import Run, progress
from lowrank_cli.schema import BASE, BenchRun, EvaluateConfig, EvaluateRun, InContextBench
from lowrank_cli.session.session import Session, start
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example

__all__ = ["figures", "measure", "metrics"]

WHOLE = "whole prompts"  #: the row of prompts that share no cache


def measure(config: BenchRun, run: Run) -> dict[str, Any]:
    """A row for each of ``bench.methods`` and one for whole prompts; times are relative to the bare model's."""
    bench = config.bench
    assert isinstance(bench, InContextBench) and config.task is not None
    calibrating = {entry: variant for entry, variant in config.variants.items() if entry != BASE}
    session = start(_evaluation(config, next(iter(calibrating.values()))))
    session.greet(run)
    session.model.eval()
    queries = session.task.test[: bench.queries]
    prompts = with_demonstrations(queries, draw(session.task.train, bench.shots, config.seed, "bench.shots"))
    plain = partial(choice_scores, session, queries, prompts, bench.shots)
    work: dict[str, Callable[[], Any]] = {BASE: plain, WHOLE: partial(whole_prompts, session, queries, prompts)}
    notes, examples = [], len(session.task.train)
    for entry, variant in calibrating.items():
        calibrated = replace(session, method=methods.create(variant), config=replace(session.config, method=variant))
        began = time.process_time()
        work[entry] = partial(_answer, calibrated, fit(calibrated), queries)
        seconds = time.process_time() - began
        notes.append(f"{entry}: fitted once to {examples} training examples in {seconds:.2f} s of CPU time")
    error = (torch.tensor(work[BASE]()) - torch.tensor(work[WHOLE]())).abs().max().item()
    notes.append(f"log probabilities of whole prompts and of the shared cache differ by {error:.1e} at most")
    with progress.bar("measuring", (bench.rounds + 1) * len(work), shown=True) as bar:
        samples = interleaved({e: partial(timed, w, session.device) for e, w in work.items()}, bench.rounds, bar)
    return {
        "model": session.header,
        "layers": session.model.config.get_text_config().num_hidden_layers,
        "title": f"{len(queries)} queries of {config.task.name} with {bench.shots} demonstrations",
        "notes": notes,
        "rows": rows(samples, BASE, queries=len(queries)),
    }


def _evaluation(config: BenchRun, variant: Any) -> EvaluateRun:
    """The configuration of ``lrk evaluate`` for the same queries and demonstrations."""
    bench = config.bench
    assert isinstance(bench, InContextBench) and config.task is not None
    evaluate = EvaluateConfig(batch_size=bench.batch_size, num_beams=1, shots=bench.shots, split="test")
    return EvaluateRun(
        seed=config.seed,
        outputs=config.outputs,
        name=config.name,
        model=config.model,
        task=config.task,
        hardware=config.hardware,
        method=variant,
        evaluate=evaluate,
        run=None,
    )


def _answer(session: Session, fitted: Fitted, queries: Sequence[Example]) -> None:
    """Answer ``queries`` after one set of demonstrations, with everything that the method precomputes for it."""
    assert isinstance(session.method, Calibrates)
    head, shots = head_weight(session.model), session.config.evaluate.shots  # type: ignore[attr-defined]
    scorer = WordingScorer(session, [session.method], fitted.wordings[0], head, fitted.seed)
    scorer.results(Arrangement(0, 0, 0), queries, shots)


@torch.no_grad()
def whole_prompts(session: Session, examples: Sequence[Example], prompts: Sequence[str]) -> list[list[float]]:
    """Log probabilities of every answer, from a full pass over prompt and answer, in batches of similar length."""
    shots = session.config.evaluate.shots  # type: ignore[attr-defined]
    tokens = encode.encode_prompts(session.tokenizer, prompts, [session.max_length(shots)] * len(prompts))
    requests = [
        (index, column, tokens[index], answer)
        for index, example in enumerate(examples)
        for column, answer in enumerate(answers(session, example))
    ]
    requests.sort(key=lambda request: len(request[2]) + len(request[3]))
    scores = [[0.0] * len(example.choices) for example in examples]
    for at in range(0, len(requests), session.batch_size):
        chunk = requests[at : at + session.batch_size]
        batch = encode.collate_prompts([p + answer for *_, p, answer in chunk], session.tokenizer.pad_token_id)
        batch = {key: value.to(session.device) for key, value in batch.items()}  # (B, T), padded on the left
        positions = (batch["attention_mask"].cumsum(dim=-1) - 1).clamp_min(0)
        longest = max(len(answer) for *_, answer in chunk)
        logits = session.model(**batch, position_ids=positions, use_cache=False, logits_to_keep=longest + 1).logits
        for (index, column, _, answer), row in zip(chunk, logits, strict=True):
            predicted = row[-len(answer) - 1 : -1].float()  # (longest + 1, V) -> (K, V)
            tokens_of_answer = torch.tensor(answer, device=predicted.device)[:, None]  # (K, 1)
            scores[index][column] = log_softmax(predicted, tokens_of_answer).sum().item()
    return scores
