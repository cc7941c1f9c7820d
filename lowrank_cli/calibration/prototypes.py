"""Prototypical calibration: answers are decided by a Gaussian mixture over their log probabilities.

Han et al., "Prototypical Calibration for Few-shot Learning of Language Models", ICLR 2023: as many clusters as answers,
fitted by EM on unlabelled examples. Each cluster is matched to one answer so that the sum of the clusters' mean log
probabilities of their answers is largest; an input belongs to the cluster with the largest posterior.

The clusters' weights estimate the shares of the answers in the examples: on a skewed set they are skewed too, which is
not corrected.

Reconstruction: scores are normalised over the answers; covariances are full, with ``RIDGE`` on the diagonal; of several
k-means++ starts the one with the largest likelihood is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3  #: added to each variance, in squared nats, so that clusters of one point are not degenerate
STARTS, ROUNDS, TOLERANCE = 10, 100, 1e-5  #: of EM; the tolerance is in nats per example


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture, with clusters in the order of their answers."""

    weights: Tensor  #: (K,)
    means: Tensor  #: (K, C)
    covariances: Tensor  #: (K, C, C)

    def log_joint(self, points: Tensor) -> Tensor:
        """log p(point, cluster): points (N, C) -> (N, K)."""
        normal = torch.distributions.MultivariateNormal(self.means, self.covariances)
        log_probability: Tensor = normal.log_prob(points.unsqueeze(1))
        return log_probability + self.weights.log()

    def posterior(self, scores: Tensor) -> Tensor:
        """log p(answer | scores) of answer scores (N, C): (N, C)."""
        return self.log_joint(scores.double().log_softmax(dim=-1)).log_softmax(dim=-1)


def fit(scores: Tensor, seed: int) -> Mixture:
    """Fit a mixture to the scores (N, C) of unlabelled examples, with clusters matched to the C answers."""
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
    """For each column, the row of the assignment with the largest sum of gains; square, exact, O(2ⁿ n)."""
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
    """k-means++: points far from those already chosen are more likely. (N, C) -> (C, C)."""
    chosen = [points[int(torch.randint(len(points), (1,), generator=generator))]]
    while len(chosen) < points.shape[1]:
        far = torch.cdist(points, torch.stack(chosen)).square().min(dim=1).values + 1e-12  # (N,)
        chosen.append(points[int(torch.multinomial(far, 1, generator=generator))])
    return torch.stack(chosen)


def _expectation_maximisation(points: Tensor, means: Tensor) -> tuple[Mixture, float]:
    """EM from the given means (K, C). Returns the mixture and its mean log likelihood."""
    clusters, width = means.shape
    ridge = RIDGE * torch.eye(width, dtype=points.dtype)
    covariance = torch.cov(points.t(), correction=0).reshape(width, width) + ridge
    mixture = Mixture(torch.full((clusters,), 1 / clusters).double(), means, covariance.expand(clusters, -1, -1))
    before = -float("inf")
    for _ in range(ROUNDS):
        joint = mixture.log_joint(points)  # (N, K)
        likelihood = joint.logsumexp(dim=-1).mean().item()
        if likelihood - before < TOLERANCE:
            break
        before = likelihood
        shares = joint.softmax(dim=-1) + 1e-12  # (N, K); not 0, so empty clusters stay defined
        mass = shares.sum(dim=0)  # (K,)
        means = shares.t() @ points / mass[:, None]
        centred = points.unsqueeze(1) - means  # (N, K, C)
        covariances = torch.einsum("nk,nki,nkj->kij", shares, centred, centred) / mass[:, None, None] + ridge
        mixture = Mixture(mass / mass.sum(), means, covariances)
    return mixture, likelihood
