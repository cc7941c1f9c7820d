"""Which training examples are the demonstrations of a prompt, and in which order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Plan
from lowrank_cli.schema import TaskConfig
from lowrank_cli.tasks.task import Example, flipped


def draw(examples: Sequence[Example], shots: int, seed: int, key: str = "evaluate.shots") -> list[Example]:
    """``shots`` random examples, the same for every query. ``key`` is the setting that an error names."""
    _require(key, shots, len(examples))
    return random.Random(seed).sample(list(examples), shots)


def _require(key: str, count: int, available: int) -> None:
    if count > available:
        raise UserError(f"{key}: {count} are asked for, there are {available} demonstrations to draw from")


def as_shown(plan: Plan, config: TaskConfig, examples: Sequence[Example]) -> list[Example]:
    """The examples as they are demonstrated, or the other way round for a channel."""
    return [flipped(config, example)[example.label or 0] if plan.channel else example for example in examples]


def feature_texts(plan: Plan, config: TaskConfig, examples: Sequence[Example]) -> list[str]:
    """The texts at whose last position the examples' features are read."""
    return [shown.prompt + (shown.answer if plan.answered else "") for shown in as_shown(plan, config, examples)]


def pool(examples: Sequence[Example], plan: Plan, seed: int) -> list[Example]:
    """The training examples that statistics are fitted on and demonstrations are drawn from (D in the paper).

    With ``plan.share``, the largest subset (at most ``plan.examples``) in which the first label has that share.
    """
    if plan.share is not None:
        first = [example for example in examples if example.label == 0]
        others = [example for example in examples if example.label != 0]
        size = min([plan.examples or len(examples), *_sizes(len(first), len(others), plan.share)])
        count = round(size * plan.share)
        return [*draw(first, count, seed, "method.share"), *draw(others, size - count, seed, "method.share")]
    return list(examples) if plan.examples is None else draw(examples, plan.examples, seed, "method.examples")


def _sizes(first: int, others: int, share: float) -> Iterator[int]:
    """Largest sizes of a subset with ``share``, given the numbers of examples of the first label and of the others."""
    if share > 0:
        yield int(first / share)
    if share < 1:
        yield int(others / (1 - share))


@dataclass(frozen=True)
class Arrangement:
    """One way to arrange demonstrations: which template, which set of examples, in which order."""

    template: int
    draw: int
    permutation: int


def arrangements(plan: Plan, shots: int) -> list[Arrangement]:
    """All distinct arrangements: without demonstrations there is one set, and a single one has one order."""
    draws, orders = (plan.draws if shots else 1), (plan.permutations if shots > 1 else 1)
    return [Arrangement(t, d, p) for t in range(plan.templates) for d in range(draws) for p in range(orders)]


def unused_options(plan: Plan, shots: int) -> list[str]:
    """A line for each option about demonstrations that has no effect with so few ``shots``."""
    unused = []
    if shots < 2 and plan.permutations > 1:
        unused.append(f"method.permutations={plan.permutations}")
    if not shots and plan.draws > 1:
        unused.append(f"method.draws={plan.draws}")
    if not shots and plan.per_query:
        random_ones = plan.choice in ("random", "imbalanced")
        unused.append("method.per_query=true" if random_ones else f"method.demonstrations={plan.choice}")
    lines = [f"{option} has no effect with evaluate.shots={shots}" for option in unused]
    if not shots and plan.share is not None:
        lines.append(f"method.share={plan.share:g} changes the statistics alone with evaluate.shots=0")
    return lines


def sets(plan: Plan, shots: int, pool: Sequence[Example], seed: int) -> list[list[int]]:
    """``plan.draws`` sets of demonstrations, as indices into ``pool``; the first is that of a plain evaluation.

    No two of them share an example as long as the pool has ``shots`` unused ones; then all can be drawn again. Sets of
    different seeds are independent.
    """
    groups = _groups(plan, shots, pool)
    unused = [list(indices) for indices, _ in groups]
    drawn = []
    for number in range(plan.draws):
        rng, chosen = random.Random(f"{seed} set {number}" if number else seed), []
        for group, (indices, count) in enumerate(groups):
            if len(unused[group]) < count:
                unused[group] = list(indices)
            picked = rng.sample(unused[group], count)
            unused[group] = sorted(set(unused[group]) - set(picked))
            chosen += picked
        if plan.share is not None:
            rng.shuffle(chosen)
        drawn.append(chosen)
    return drawn


def own_sets(
    plan: Plan, shots: int, pool: Sequence[Example], seed: int, draw: int, inputs: Sequence[Example]
) -> list[list[int]]:
    """A random set of demonstrations for each input, as indices into ``pool``.

    An input of the pool is not its own demonstration, so in a pool of ``shots`` examples it has one fewer.
    """
    groups = _groups(plan, shots, pool)
    drawn = []
    for number, example in enumerate(inputs):
        rng, chosen = random.Random(f"{seed} set {draw} of {number}"), []
        for indices, count in groups:
            others = [index for index in indices if pool[index] is not example]
            chosen += rng.sample(others, min(count, len(others)))
        rng.shuffle(chosen)
        drawn.append(chosen)
    return drawn


def _groups(plan: Plan, shots: int, pool: Sequence[Example]) -> list[tuple[list[int], int]]:
    """From which examples how many demonstrations are drawn: from all, or with ``plan.share`` from two groups.

    Raises:
        UserError: there are too few.
    """
    if plan.share is None:
        groups, key = [(list(range(len(pool))), shots)], "evaluate.shots"
    else:
        count, key = round(shots * plan.share), "method.share"
        first = [index for index, example in enumerate(pool) if example.label == 0]
        others = [index for index, example in enumerate(pool) if example.label != 0]
        groups = [(first, count), (others, shots - count)]
    for indices, count in groups:
        _require(key, count, len(indices))
    return groups


def ordered(chosen: list[int], arrangement: Arrangement, seed: int) -> list[int]:
    """A set of demonstrations in the arrangement's order; permutation 0 keeps the set's order."""
    if arrangement.permutation:
        chosen = list(chosen)
        random.Random(f"{seed} set {arrangement.draw} order {arrangement.permutation}").shuffle(chosen)
    return chosen


def nearest(plan: Plan, shots: int, features: Tensor, queries: Tensor) -> list[list[int]]:
    """Indices of the ``shots`` most (or least) similar examples for each query, the most extreme one last.

    Args:
        features: hidden states of the pool's prompts (n, D).
        queries: hidden states of the queries' prompts (Q, D).
    """
    if shots > len(features):
        raise UserError(f"evaluate.shots: {shots} are asked for, there are {len(features)} demonstrations to choose")
    similarity = F.normalize(queries, dim=-1) @ F.normalize(features, dim=-1).t()  # (Q, D) @ (D, n) -> (Q, n)
    best = similarity.topk(shots, dim=-1, largest=plan.choice == "similar").indices.flip(1)  # (Q, m)
    return best.tolist()
