"""What a constant offset of each answer's score could gain at most: it is chosen with the labels of the queries.

An upper bound to report beside calibrations that add such offsets, never a calibration: it needs the right answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 100  #: over all answers, at most; three to five are usual
RESTARTS = 20  #: from random offsets, where there are more than two answers


def best_offsets(scores: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """The offsets (C,) with which the largest of ``scores`` (N, C) + offsets is most often that of the label (N,).

    Every answer's offset in turn takes its best value, given the others', until none can be improved. With two answers
    that is exact; with more it is the best of the local optima that are reached from ``start`` (C,) and from
    :data:`RESTARTS` random offsets, the same in every call, as far apart as the scores are. No worse than ``start``.
    """
    starts = [start]
    if scores.shape[1] > 2:
        generator = torch.Generator().manual_seed(0)
        apart = (scores - scores.mean(dim=1, keepdim=True)).std()
        drawn = torch.randn(RESTARTS, scores.shape[1], generator=generator, dtype=torch.float64) * apart
        starts += list((drawn - scores.mean(dim=0)).to(scores))
    found = [_local_optimum(scores, labels, each) for each in starts]
    return max(found, key=lambda offsets: int(((scores + offsets).argmax(dim=1) == labels).sum()))


def _local_optimum(scores: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    offsets = start.clone()
    for _ in range(ROUNDS):
        before = offsets.clone()
        for answer in range(scores.shape[1]):
            value, gain = _best_offset(scores + offsets, labels, answer)
            if gain > 0:
                offsets[answer] += value
        if torch.equal(offsets, before):
            break
    return offsets


def _best_offset(scores: Tensor, labels: Tensor, answer: int) -> tuple[float, int]:
    """What to add to the scores of ``answer``, and how many more rows of scores (N, C) it makes right."""
    others = scores.clone()
    others[:, answer] = -torch.inf
    rival, second = others.max(dim=1)  # (N,)
    thresholds, order = (rival - scores[:, answer]).sort()  # a row is answered with ``answer`` above its threshold
    change = ((labels == answer).int() - (labels == second).int())[order]  # (N,): of right answers, passing it
    gained = torch.cat(
        [change.new_zeros(1), change.cumsum(0)]
    )  # (N + 1,): below all thresholds, then above the first …
    bounds = torch.cat([thresholds[:1] - 1, thresholds, thresholds[-1:] + 1])  # (N + 2,)
    middles, distinct = (bounds[1:] + bounds[:-1]) / 2, bounds[1:] > bounds[:-1]  # (N + 1,)
    now = (labels[order] == torch.where(thresholds < 0, answer, second[order])).sum()
    base = (labels == second).sum()  # right below all thresholds
    best = torch.where(distinct, gained, -len(labels)).argmax()
    return middles[best].item(), int(base + gained[best] - now)
