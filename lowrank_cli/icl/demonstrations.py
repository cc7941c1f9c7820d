"""Which training examples stand in a prompt as demonstrations, and in which order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Plan
from lowrank_cli.tasks.task import Example


def draw(examples: Sequence[Example], shots: int, seed: int, key: str = "evaluate.shots") -> list[Example]:
    """``shots`` examples at random; the same for every query."""
    if shots > len(examples):
        raise UserError(f"{key}: {shots} are asked for, there are {len(examples)} demonstrations to draw from")
    return random.Random(seed).sample(list(examples), shots)


def pool(examples: Sequence[Example], plan: Plan, seed: int) -> list[Example]:
    """D: the training examples that statistics are fitted on and demonstrations are drawn from.

    With a ``share`` it is the largest part of them (at most ``plan.examples``) in which the first label has it and the
    other labels are as they were.
    """
    found = list(examples)
    if plan.share is not None:
        first = [example for example in found if example.label == 0]
        others = [example for example in found if example.label != 0]
        size = min([plan.examples or len(found), *_sizes(len(first), len(others), plan.share)])
        count = round(size * plan.share)
        return [*draw(first, count, seed, "method.share"), *draw(others, size - count, seed, "method.share")]
    return found if plan.examples is None else draw(found, plan.examples, seed, "method.examples")


def _sizes(first: int, others: int, share: float) -> Iterator[int]:
    """The sizes that each part allows."""
    if share > 0:
        yield int(first / share)
    if share < 1:
        yield int(others / (1 - share))


@dataclass(frozen=True)
class Arrangement:
    """One way to demonstrate: which wording, which set, which order."""

    template: int
    draw: int
    permutation: int


def arrangements(plan: Plan, shots: int) -> list[Arrangement]:
    """All that differ: without demonstrations nothing is drawn, and one has no order."""
    draws, orders = (plan.draws if shots else 1), (plan.permutations if shots > 1 else 1)
    return [Arrangement(t, d, p) for t in range(plan.templates) for d in range(draws) for p in range(orders)]


def idle(plan: Plan, shots: int) -> list[str]:
    """A line for each option about demonstrations that changes nothing, there being none, or one that has no order."""
    unused = []
    if shots < 2 and plan.permutations > 1:
        unused.append(f"method.permutations={plan.permutations}")
    if not shots and plan.draws > 1:
        unused.append(f"method.draws={plan.draws}")
    if not shots and plan.choice in ("similar", "dissimilar"):
        unused.append(f"method.demonstrations={plan.choice}")
    lines = [f"{option} has no effect with evaluate.shots={shots}" for option in unused]
    if not shots and plan.share is not None:
        lines.append(f"method.share={plan.share:g} changes the statistics alone with evaluate.shots=0")
    return lines


def chosen(plan: Plan, shots: int, arrangement: Arrangement, examples: Sequence[Example], seed: int) -> list[Example]:
    """The demonstrations of every query alike, out of D: set i is that of a plain evaluation with seed SEED+i."""
    seed = seed + arrangement.draw
    if plan.share is None:
        shown = draw(examples, shots, seed)
    else:
        count = round(shots * plan.share)
        parts = ([e for e in examples if (e.label == 0) == first] for first in (True, False))
        shown = [e for part, n in zip(parts, (count, shots - count)) for e in draw(part, n, seed, "method.share")]
        random.Random(seed).shuffle(shown)
    return ordered(shown, arrangement, seed)


def ordered(shown: list[Example], arrangement: Arrangement, seed: int) -> list[Example]:
    """The arrangement's order of a set; order 0 is the set's own."""
    if arrangement.permutation:
        shown = list(shown)
        random.Random(f"{seed} {arrangement.permutation}").shuffle(shown)
    return shown


def nearest(plan: Plan, shots: int, features: Tensor, queries: Tensor) -> list[list[int]]:
    """For each query (Q, D) the indices of D's features (n, D) by cosine, the extreme one last."""
    if shots > len(features):
        raise UserError(f"evaluate.shots: {shots} are asked for, there are {len(features)} demonstrations to choose")
    unit, asked = (torch.nn.functional.normalize(part, dim=-1) for part in (features, queries))
    likeness = asked @ unit.t()  # (Q, D) @ (D, n) -> (Q, n)
    best = likeness.topk(shots, dim=-1, largest=plan.choice == "similar").indices.flip(1)  # (Q, m)
    return best.tolist()
