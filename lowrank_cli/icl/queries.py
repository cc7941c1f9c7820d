"""Scores queries under one wording of a task, after any arrangement of demonstrations, with a calibrating method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import torch
from torch import Tensor

from lowrank_cli.calibration.ida import together
from lowrank_cli.icl import demonstrations
from lowrank_cli.icl.arrangement_stats import Result
from lowrank_cli.icl.demonstrations import Arrangement
from lowrank_cli.icl.hidden_states import last_hidden
from lowrank_cli.inference.choice_scores import choice_scores, with_demonstrations
from lowrank_cli.inference.predict import choice, records, score
from lowrank_cli.inference.session import Session
from lowrank_cli.methods.protocol import Calibrates
from lowrank_cli.tasks.task import Example, Task, columns, content_free


@dataclass(frozen=True)
class Wording:
    """The task under one template, and the tensors that the method fitted to it."""

    task: Task
    tensors: dict[str, Tensor]


class WordingScorer:
    """Scores queries under one wording.

    Args:
        variants: variants of one method, with the same plan, probes and fitted tensors; they share forward passes.
        head: the language model's head (V, D).
        seed: of the run that fitted the tensors; it drew the pool of examples.
    """

    def __init__(self, session: Session, variants: Sequence[Calibrates], wording: Wording, head: Tensor, seed: int):
        self.session, self.variants, self.wording, self.plan = session, variants, wording, variants[0].plan()
        self.pool = demonstrations.pool(wording.task.train, self.plan, seed)
        names = columns(wording.task.config.template)
        self.columns = {name: [example.columns[i] for example in self.pool] for i, name in enumerate(names)}
        #: the scoring rule for the tokens of the answers, the same in all arrangements: fitted once
        self.rule = cache(lambda tokens: together([v.rule(wording.tensors, head, tokens) for v in variants]))
        #: hidden states of the pool's prompts (n, D)
        self.features = cache(lambda: last_hidden(session, [example.prompt for example in self.pool]))

    def results(self, arrangement: Arrangement, queries: Sequence[Example], shots: int) -> list[Result]:
        """Each variant's answers to the queries."""
        shown = self._demonstrations(arrangement, shots)
        probes = self._probes(arrangement, shown or [])
        inputs = [*probes, *queries]
        prompts = self._prompts(arrangement, inputs, shown, shots)
        rows = choice_scores(
            self.session, inputs, prompts, shots, rule_of=self.rule, normalize_length=self.plan.normalize_length
        )
        scores = torch.tensor(rows, dtype=torch.float64).movedim(1, 0)  # (M + Q, S, C) -> (S, M + Q, C)
        indices = None if shown is None else [self.pool.index(example) for example in shown]
        results = []
        for variant, of_variant in zip(self.variants, scores, strict=True):
            probe_scores, query_scores = of_variant[: len(probes)], of_variant[len(probes) :]  # (M, C), (Q, C)
            calibrated = variant.adjust(self.wording.tensors, probe_scores, query_scores)  # (Q, C)
            answers = records(queries, [choice(q, row) for q, row in zip(queries, calibrated.tolist(), strict=True)])
            ((metric, value),) = score(self.session, answers).items()
            results.append(Result(arrangement, metric, value, indices, answers))
        return results

    def _demonstrations(self, arrangement: Arrangement, shots: int) -> list[Example] | None:
        """The demonstrations of all queries; None if each query has different ones."""
        if self.plan.choice in ("similar", "dissimilar"):
            return None
        return demonstrations.chosen(self.plan, shots, arrangement, self.pool, self.session.config.seed)

    def _probes(self, arrangement: Arrangement, shown: list[Example]) -> list[Example]:
        """The method's extra inputs: content-free prompts, and examples that are not among the demonstrations."""
        known = set(shown)
        unseen = [index for index, example in enumerate(self.pool) if example not in known]
        rng = Random(f"{self.session.config.seed} {arrangement.draw}")
        texts, indices = self.variants[0].probes(self.columns, unseen, rng)
        config = self.wording.task.config
        return [*(content_free(config, values) for values in texts), *(self.pool[i] for i in indices)]

    def _prompts(
        self, arrangement: Arrangement, inputs: list[Example], shown: list[Example] | None, shots: int
    ) -> list[str]:
        """Each input's prompt after its demonstrations."""
        if shown is not None:
            return with_demonstrations(inputs, shown)
        features = last_hidden(self.session, [example.prompt for example in inputs])
        nearest = demonstrations.nearest(self.plan, shots, self.features(), features)
        prompts = []
        for example, indices in zip(inputs, nearest, strict=True):
            examples = [self.pool[index] for index in indices]
            prompts += with_demonstrations(
                [example], demonstrations.ordered(examples, arrangement, self.session.config.seed)
            )
        return prompts
