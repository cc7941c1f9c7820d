"""A wording of a task, asked behind any arrangement of demonstrations and scored by a calibrating method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import torch
from torch import Tensor

from lowrank_cli.calibration.ida import together
from lowrank_cli.icl import arrangement_stats, demonstrations
from lowrank_cli.icl.demonstrations import Arrangement
from lowrank_cli.icl.hidden_states import last_hidden
from lowrank_cli.inference.choice_scores import choice_scores, with_demonstrations
from lowrank_cli.inference.predict import choice, records, score
from lowrank_cli.inference.session import Session
from lowrank_cli.methods.protocol import Calibrates
from lowrank_cli.tasks.task import Example, Task, columns, content_free


@dataclass(frozen=True)
class Wording:
    """The task under one template, and what a method keeps of its D."""

    task: Task
    tensors: dict[str, Tensor]


class Asked:
    """One wording of a task, asked behind any arrangement of demonstrations; ``seed`` drew D."""

    def __init__(self, session: Session, variants: Sequence[Calibrates], wording: Wording, head: Tensor, seed: int):
        self.session, self.variants, self.wording, self.plan = session, variants, wording, variants[0].plan()
        self.examples = demonstrations.pool(wording.task.train, self.plan, seed)
        names = columns(wording.task.config.template)
        self.columns = {name: [example.columns[i] for example in self.examples] for i, name in enumerate(names)}
        #: the same answers: fitted once
        self.rule = cache(lambda tokens: together([v.rule(wording.tensors, head, tokens) for v in variants]))
        self.features = cache(lambda: last_hidden(session, [example.prompt for example in self.examples]))

    def results(self, way: Arrangement, queries: Sequence[Example], shots: int) -> list[arrangement_stats.Result]:
        """Answers to the queries, by each variant."""
        shown = self._shown(way, shots)
        probes = self._probes(way, shown or [])
        asked = [*probes, *queries]
        prompts = self._prompts(way, asked, shown, shots)
        rows = choice_scores(
            self.session, asked, prompts, shots, rule_of=self.rule, normalize_length=self.plan.normalize_length
        )
        scores = torch.tensor(rows, dtype=torch.float64).movedim(1, 0)  # (M + Q, S, C) -> (S, M + Q, C)
        picked = None if shown is None else [self.examples.index(example) for example in shown]
        found = []
        for variant, own in zip(self.variants, scores, strict=True):
            calibrated = variant.adjust(self.wording.tensors, own[: len(probes)], own[len(probes) :])
            made = records(queries, [choice(q, row) for q, row in zip(queries, calibrated.tolist(), strict=True)])
            ((metric, value),) = score(self.session, made).items()
            found.append(arrangement_stats.Result(way, metric, value, picked, made))
        return found

    def _shown(self, way: Arrangement, shots: int) -> list[Example] | None:
        """The demonstrations, where all queries have the same."""
        if self.plan.choice in ("similar", "dissimilar"):
            return None
        return demonstrations.chosen(self.plan, shots, way, self.examples, self.session.config.seed)

    def _probes(self, way: Arrangement, shown: list[Example]) -> list[Example]:
        known = set(shown)
        unseen = [index for index, example in enumerate(self.examples) if example not in known]
        rng = Random(f"{self.session.config.seed} {way.draw}")
        texts, indices = self.variants[0].probes(self.columns, unseen, rng)
        config = self.wording.task.config
        return [*(content_free(config, values) for values in texts), *(self.examples[i] for i in indices)]

    def _prompts(self, way: Arrangement, asked: list[Example], shown: list[Example] | None, shots: int) -> list[str]:
        """Each prompt behind its demonstrations."""
        if shown is not None:
            return with_demonstrations(asked, shown)
        queries = last_hidden(self.session, [example.prompt for example in asked])
        prompts = []
        for example, pick in zip(
            asked, demonstrations.nearest(self.plan, shots, self.features(), queries), strict=True
        ):
            own = demonstrations.ordered([self.examples[index] for index in pick], way, self.session.config.seed)
            prompts += with_demonstrations([example], own)
        return prompts
