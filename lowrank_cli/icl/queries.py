"""Scores queries under one wording of a task, after any arrangement of demonstrations, with a calibrating method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from random import Random

import torch
from torch import Tensor

from lowrank_cli.calibration.ida import TokenRule, together
from lowrank_cli.icl import demonstrations
from lowrank_cli.icl.arrangement_stats import Result
from lowrank_cli.icl.demonstrations import Arrangement
from lowrank_cli.icl.hidden_states import last_hidden
from lowrank_cli.inference.choice_scores import choice_scores, with_demonstrations
from lowrank_cli.inference.predict import choice, records, score
from lowrank_cli.methods.protocol import Calibrates
from lowrank_cli.session.session import Session
from lowrank_cli.tasks.task import Example, Task, columns, content_free, flipped

RuleOf = Callable[[tuple[int, ...]], TokenRule]  #: the tokens of all answers -> the scoring rule


@dataclass(frozen=True)
class Wording:
    """The task under one template, and the tensors that the method fitted to it."""

    task: Task
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Probes:
    """Extra inputs of a variant; those of several variants are scored once where they are equal."""

    texts: tuple[tuple[tuple[str, str], ...], ...]  #: content-free ones: (column, text) for each column
    indices: tuple[int, ...]  #: examples of the pool
    left_out: bool  #: these are the demonstrations, each of which follows the others


class WordingScorer:
    """Scores queries under one wording.

    Args:
        variants: of one method, which show the same demonstrations; they share forward passes.
        head: the language model's head (V, D).
        seed: of the run that fitted the tensors; it drew the pool of examples.
    """

    def __init__(self, session: Session, variants: Sequence[Calibrates], wording: Wording, head: Tensor, seed: int):
        self.session, self.variants, self.wording, self.plan = session, variants, wording, variants[0].plan()
        self.head = head
        self.pool = demonstrations.pool(wording.task.train, self.plan, seed)
        self.demonstrated = demonstrations.as_shown(self.plan, wording.task.config, self.pool)
        names = columns(wording.task.config.template)
        self.columns = {name: [example.columns[i] for example in self.pool] for i, name in enumerate(names)}
        #: a variant's rule by the pool's statistics, the same in all arrangements
        self.pool_rule = cache(lambda number, tokens: self.variants[number].rule(wording.tensors, self.head, tokens))
        self.sets = cache(lambda shots: demonstrations.sets(self.plan, shots, self.pool, session.config.seed))
        #: hidden states of the pool's prompts (n, D)
        self.features = cache(lambda: last_hidden(session, [example.prompt for example in self.pool]))
        self.demonstration_features: dict[int, Tensor] = {}  #: (D,), of those shown so far

    def results(self, arrangement: Arrangement, queries: Sequence[Example], shots: int) -> list[Result]:
        """Each variant's answers to the queries."""
        own = self.plan.per_query and shots > 0
        of_all = [] if own else self._ordered(arrangement, [self.sets(shots)[arrangement.draw]])[0]
        sets = self._own_sets(arrangement, queries, shots) if own else [of_all] * len(queries)
        inputs, input_sets = list(queries), list(sets)
        of_variants = [self._probes(variant, arrangement, of_all) for variant in self.variants]
        spans: dict[_Probes, slice] = {}
        same_set = len(inputs)
        for probes in sorted(dict.fromkeys(of_variants), key=lambda probes: probes.left_out):
            start = len(inputs)
            for example, chosen in self._probe_inputs(probes, arrangement, sets if own else [of_all], shots):
                inputs.append(example)
                input_sets.append(chosen)
            spans[probes] = slice(start, len(inputs))
            same_set = start if probes.left_out else len(inputs)
        shown = self._fit_shown(sets) if any(variant.plan().shown for variant in self.variants) else {}
        rule = partial(self._rule, shown)
        scores = self._scores(inputs[:same_set], input_sets[:same_set], shots, rule)  # (S, Q + M, C)
        if same_set < len(inputs):  # by themselves, as prompts that share less would shorten the prefix of all
            left_out = self._scores(inputs[same_set:], input_sets[same_set:], shots, rule)
            scores = torch.cat([scores, left_out], dim=1)
        results = []
        for variant, probes, of_variant in zip(self.variants, of_variants, scores, strict=True):
            query_scores, probe_scores = of_variant[: len(queries)], of_variant[spans[probes]]  # (Q, C), (M, C)
            if own and probes.texts:
                probe_scores = probe_scores.unflatten(0, (len(queries), -1))  # (Q * M, C) -> (Q, M, C)
            calibrated = variant.adjust(self._tensors(variant, shown), probe_scores, query_scores)  # (Q, C)
            answers = records(queries, [choice(q, row) for q, row in zip(queries, calibrated.tolist(), strict=True)])
            metric = self.session.task.metric
            value = score(self.session, answers)[metric]
            count = spans[probes].stop - spans[probes].start
            results.append(Result(arrangement, metric, value, None if own else of_all, answers, count))
        return results

    def _rule(self, shown: dict[str, Tensor], tokens: tuple[int, ...]) -> TokenRule:
        """The variants' rules for the answers' tokens, together; ``shown`` is fitted to the demonstrations shown."""
        return together([
            variant.rule(shown, self.head, tokens) if variant.plan().shown else self.pool_rule(number, tokens)
            for number, variant in enumerate(self.variants)
        ])  # fmt: skip

    def _tensors(self, variant: Calibrates, shown: dict[str, Tensor]) -> dict[str, Tensor]:
        return shown if variant.plan().shown else self.wording.tensors

    def _scores(
        self,
        inputs: Sequence[Example],
        sets: Sequence[Sequence[int]],
        shots: int,
        rule: RuleOf,
    ) -> Tensor:
        """Scores (S, N, C) of the answers to N inputs, each after its set of demonstrations, for S variants."""
        if self.plan.channel:  # an input for each answer, with one choice: the query
            answers = len(self.wording.task.label_words)
            inputs = [each for example in inputs for each in flipped(self.wording.task.config, example)]
            sets = [chosen for chosen in sets for _ in range(answers)]
        prompts = [
            with_demonstrations([example], [self.demonstrated[index] for index in chosen])[0]
            for example, chosen in zip(inputs, sets, strict=True)
        ]
        normalize = self.plan.normalize_length
        rows = choice_scores(self.session, inputs, prompts, shots, rule_of=rule, normalize_length=normalize)
        scores = torch.tensor(rows, dtype=torch.float64).movedim(1, 0)  # (N, S, C) -> (S, N, C)
        return scores.view(len(scores), -1, answers) if self.plan.channel else scores

    def _own_sets(self, arrangement: Arrangement, inputs: Sequence[Example], shots: int) -> list[list[int]]:
        """Each input's demonstrations, in the arrangement's order."""
        if not inputs:
            return []
        if self.plan.choice in ("similar", "dissimilar"):
            features = last_hidden(self.session, [example.prompt for example in inputs])
            sets = demonstrations.nearest(self.plan, shots, self.features(), features)
        else:
            seed = self.session.config.seed
            sets = demonstrations.own_sets(self.plan, shots, self.pool, seed, arrangement.draw, inputs)
        return self._ordered(arrangement, sets)

    def _ordered(self, arrangement: Arrangement, sets: list[list[int]]) -> list[list[int]]:
        return [demonstrations.ordered(chosen, arrangement, self.session.config.seed) for chosen in sets]

    def _probes(self, variant: Calibrates, arrangement: Arrangement, shown: list[int]) -> _Probes:
        """A variant's extra inputs; it does not see the demonstrations among them."""
        unseen = sorted(set(range(len(self.pool))) - set(shown))
        rng = Random(f"{self.session.config.seed} {arrangement.draw}")
        probes = variant.probes(self.columns, unseen, rng)
        texts = tuple(tuple(values.items()) for values in probes.texts)
        return _Probes(texts, tuple(shown if probes.left_out else probes.examples), probes.left_out)

    def _probe_inputs(
        self, probes: _Probes, arrangement: Arrangement, sets: Sequence[list[int]], shots: int
    ) -> Iterator[tuple[Example, list[int]]]:
        """A variant's extra inputs, each with its demonstrations.

        Args:
            sets: one set of demonstrations for each query, or the one that all queries share.
        """
        texts = [content_free(self.wording.task.config, dict(values)) for values in probes.texts]
        yield from ((text, chosen) for chosen in sets for text in texts)
        examples = [self.pool[index] for index in probes.indices]
        if probes.left_out:
            before = [[other for other in probes.indices if other != index] for index in probes.indices]
        elif self.plan.per_query and shots:
            before = self._own_sets(arrangement, examples, shots)
        else:
            before = [sets[0]] * len(examples)
        yield from zip(examples, before, strict=True)

    def _fit_shown(self, sets: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The method's tensors, fitted to the demonstrations in ``sets``."""
        shown = sorted({index for chosen in sets for index in chosen})
        new = [index for index in shown if index not in self.demonstration_features]
        if new:
            examples = [self.pool[index] for index in new]
            texts = demonstrations.feature_texts(self.plan, self.wording.task.config, examples)
            self.demonstration_features |= dict(zip(new, last_hidden(self.session, texts), strict=True))
        features = torch.stack([self.demonstration_features[index] for index in shown])  # (n, D)
        labels = torch.tensor([self.pool[index].label for index in shown])  # (n,)
        return self.variants[0].fit(features, labels, len(self.wording.task.label_words))
