"""Prototypical calibration: a Gaussian mixture over the answers' log probabilities decides, not their largest.

Han et al., "Prototypical Calibration for Few-shot Learning of Language Models", ICLR 2023: as many clusters as answers,
fitted by EM on unlabelled examples; each cluster stands for one answer, matched so that the clusters' mean log
probabilities of their answers sum to the most; an input belongs to the cluster of the largest posterior.

The clusters' weights are the shares of the answers as the examples seem to have them: fitted on a skewed set, they are
skewed as it is, and nothing takes that out again.

Reconstruction: scores are normalised over the answers; full covariances with ``RIDGE`` on the diagonal; starts are
k-means++ seedings, and the start of the largest likelihood wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3  #: added to each variance, in squared nats: clusters of one point stay clusters
STARTS, ROUNDS, TOLERANCE = 10, 100, 1e-5  #: of EM; the tolerance is in nats per example


@dataclass(frozen=True)
class Mixture:
    """Clusters in the order of the answers they stand for."""

    weights: Tensor  #: (K,)
    means: Tensor  #: (K, C)
    covariances: Tensor  #: (K, C, C)

    def log_joint(self, points: Tensor) -> Tensor:
        """log p(point, cluster): points (N, C) -> (N, K)."""
        normal = torch.distributions.MultivariateNormal(self.means, self.covariances)
        log_probability: Tensor = normal.log_prob(points.unsqueeze(1))  # type: ignore[no-untyped-call]  # (N, K)
        return log_probability + self.weights.log()

    def posterior(self, scores: Tensor) -> Tensor:
        """log p(answer | scores) of answer scores (N, C): (N, C)."""
        return self.log_joint(scores.double().log_softmax(dim=-1)).log_softmax(dim=-1)


def fit(scores: Tensor, seed: int) -> Mixture:
    """The mixture of the scores (N, C) of unlabelled examples, its clusters matched to the C answers."""
    points = scores.double().log_softmax(dim=-1)
    generator = torch.Generator().manual_seed(seed)
    best, most = None, -float("inf")
    for _ in range(STARTS):
        mixture, likelihood = _expectation_maximisation(points, _seeds(points, generator))
        if likelihood > most:
            best, most = mixture, likelihood
    assert best is not None, "EM keeps likelihoods finite"
    order = torch.tensor(match(best.means.tolist()))
    return Mixture(best.weights[order], best.means[order], best.covariances[order])


def match(gains: list[list[float]]) -> list[int]:
    """For each column the row matched to it so that the matched gains sum to the most; square, exact, O(2ⁿ n)."""
    size = len(gains)
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # rows used, as bits -> gain, row of each column so far
    for column in range(size):
        longer: dict[int, tuple[float, list[int]]] = {}
        for used, (gain, rows) in best.items():
            for row in range(size):
                if not used >> row & 1:
                    more = gain + gains[row][column]
                    key = used | 1 << row
                    if key not in longer or more > longer[key][0]:
                        longer[key] = (more, [*rows, row])
        best = longer
    return best[2**size - 1][1]


def _seeds(points: Tensor, generator: torch.Generator) -> Tensor:
    """k-means++: points far from those chosen before are likelier to be chosen. (N, C) -> (C, C)."""
    chosen = [points[int(torch.randint(len(points), (1,), generator=generator))]]
    while len(chosen) < points.shape[1]:
        far = torch.cdist(points, torch.stack(chosen)).square().min(dim=1).values + 1e-12  # (N,)
        chosen.append(points[int(torch.multinomial(far, 1, generator=generator))])
    return torch.stack(chosen)


def _expectation_maximisation(points: Tensor, means: Tensor) -> tuple[Mixture, float]:
    """EM from the given means (K, C); the mixture and its mean log likelihood."""
    clusters, width = means.shape
    ridge = RIDGE * torch.eye(width, dtype=points.dtype)
    spread = torch.cov(points.t(), correction=0).reshape(width, width) + ridge
    mixture = Mixture(torch.full((clusters,), 1 / clusters).double(), means, spread.expand(clusters, -1, -1))
    before = -float("inf")
    for _ in range(ROUNDS):
        joint = mixture.log_joint(points)  # (N, K)
        likelihood = joint.logsumexp(dim=-1).mean().item()
        if likelihood - before < TOLERANCE:
            break
        before = likelihood
        belongs = joint.softmax(dim=-1) + 1e-12  # (N, K): an empty cluster stays where it is, tiny
        mass = belongs.sum(dim=0)  # (K,)
        means = belongs.t() @ points / mass[:, None]
        apart = points.unsqueeze(1) - means  # (N, K, C)
        spreads = torch.einsum("nk,nki,nkj->kij", belongs, apart, apart) / mass[:, None, None] + ridge
        mixture = Mixture(mass / mass.sum(), means, spreads)
    return mixture, likelihood
