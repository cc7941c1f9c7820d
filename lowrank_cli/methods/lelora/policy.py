"""The policy that chooses a window of the spectrum for each matrix, and its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_cli.adapter.kinds.svd_window import Spectrum
from lowrank_cli.adapter.target_sites import ROLES, Site

POINTS = 32  #: resampled singular values that describe a matrix
NUMBERS = POINTS + len(ROLES) + 7  #: features, without the gradient's share in each band
HIDDEN = 64
SPREAD = 0.5  #: standard deviation of the sampled width logits
CLIP = 0.2  #: largest relative change of a choice's probability that is rewarded (Schulman et al. 2017, section 6.1)


def features(
    sites: Sequence[Site], spectra: Sequence[Spectrum], drift: Tensor, energy: Tensor, progress: float
) -> Tensor:
    """The policy's input for each matrix: (M, F = 46 + P), scale-free and standardised over matrices.

    Log singular values relative to ‖W‖_F, resampled to 32 points; logs of the Frobenius norm (per entry) and of the
    spectral and nuclear norms (relative to Frobenius); stable rank; ``drift`` (M,) = ‖W − W₀‖_F / ‖W₀‖_F; ``energy``
    (M, P), the gradient's share in each band of the spectrum; depth; role; ``progress``, the share of training done.
    """
    depth = max(site.layer or 0 for site in sites) or 1
    rows = []
    for site, spectrum in zip(sites, spectra, strict=True):
        values = spectrum.values.cpu()
        norm = values.square().sum().sqrt().clamp_min(1e-12)
        relative = (values / norm).clamp_min(1e-6)
        curve = F.interpolate(relative.log().view(1, 1, -1), POINTS, mode="linear", align_corners=True).flatten()
        numbers = torch.stack(
            [
                (norm / math.sqrt(site.in_features * site.out_features)).log(),
                relative[0].log(),
                (relative.sum() / math.sqrt(len(values))).log(),
                1 / relative[0].square() / len(values),
            ]
        )
        role = torch.tensor([float(site.role == role) for role in ROLES])
        rows.append(torch.cat([curve, numbers, role, torch.tensor([(site.layer or 0) / depth])]))
    table = torch.cat([torch.stack(rows), drift.unsqueeze(1), energy], dim=1)
    relative = (table - table.mean(dim=0)) / (table.std(dim=0, correction=0) + 1e-6)
    return torch.cat([relative, torch.full((len(rows), 1), progress)], dim=1)


def share_out(logits: Tensor, budget: int, limits: Sequence[int]) -> list[int]:
    """Widths in proportion to softmax(``logits``) (M,), each at most its limit, that sum to ``budget`` exactly.

    The excess over a limit is shared among the others; fractions are rounded by largest remainder.
    """
    assert sum(limits) >= budget
    limit = torch.tensor(limits, dtype=torch.float64)
    full = torch.zeros_like(limit, dtype=torch.bool)
    while True:
        weights = torch.softmax(logits.double().masked_fill(full, -torch.inf), dim=0)
        wanted = torch.where(full, limit, (budget - limit[full].sum()) * weights)
        if not (over := (wanted > limit) & ~full).any():
            break
        full |= over
    widths = wanted.floor()
    missing = budget - int(widths.sum())
    remainder = torch.where(widths < limit, wanted - widths, -1.0)
    widths[remainder.argsort(descending=True, stable=True)[:missing]] += 1
    return [int(width) for width in widths]


class Policy(nn.Module):
    """One network for all matrices: maps features to log-probabilities of places and to the logit of a width share.

    Initially all places are equally likely, and width logits are normal with mean 0. Only differences of width logits
    matter, so their means are centred over the matrices.
    """

    def __init__(self, places: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(NUMBERS + places, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.heads = nn.Linear(HIDDEN, places + 1)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(…, M, F) -> log-probabilities of places (…, M, P) and means of width logits (…, M)."""
        out = self.heads(self.body(x))
        widths = out[..., -1]
        return torch.log_softmax(out[..., :-1], dim=-1), widths - widths.mean(dim=-1, keepdim=True)

    @torch.no_grad()
    def sample(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample a place (M,) and a width logit (M,) for each matrix."""
        log_places, means = self(x)
        places = torch.multinomial(log_places.exp(), 1, generator=generator).squeeze(1)
        return places, means + SPREAD * torch.randn(len(x), generator=generator)

    @torch.no_grad()
    def greedy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely place and the mean width logit."""
        log_places, means = self(x)
        return log_places.argmax(dim=1), means

    def log_likelihood(self, x: Tensor, places: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """log π(choice) (…, M), up to a constant, and the entropy of the places (…, M)."""
        log_places, means = self(x)
        chosen = log_places.gather(-1, places.unsqueeze(-1)).squeeze(-1)  # (…, M, P) -> (…, M)
        return chosen - (logits - means).square() / (2 * SPREAD**2), -(log_places.exp() * log_places).sum(dim=-1)

    def loss(
        self, x: Tensor, places: Tensor, logits: Tensor, likelihood: Tensor, advantage: Tensor, entropy: float
    ) -> Tensor:
        """−mean min(ρ A, clip(ρ) A), less ``entropy`` × the mean entropy of the places (Schulman et al. 2017, eq. 7).

        ρ is π(choice) relative to its value when the choice was made, whose log is ``likelihood`` (…, M). At ρ = 1 the
        gradient is that of REINFORCE (Williams 1992); clipping allows several passes over the same choices.
        """
        now, uncertain = self.log_likelihood(x, places, logits)
        ratio = (now - likelihood).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        return -gain.mean() - entropy * uncertain.mean()


def advantages(rewards: Tensor) -> Tensor:
    """Rewards (K, M) of K phases -> advantages (K, M), which compare each matrix with itself in other phases.

    (r − mean over phases) / mean over phases of |r|, divided by the standard deviation over all. A reconstruction:
    credits are first divided by the sum of their magnitudes in a phase, because otherwise the first phases, where the
    loss falls a hundred times as fast, would decide alone; without the division here the matrices with the largest
    credits would. A single phase gives zeros.
    """
    above = (rewards - rewards.mean(dim=0)) / rewards.abs().mean(dim=0).clamp_min(1e-12)
    return above / above.std(correction=0).clamp_min(1e-12)


def without_trend(rewards: Tensor) -> Tensor:
    """Rewards (K, M) of K ≥ 3 phases minus their linear trend, for ``global`` rewards.

    The loss falls ever more slowly, whatever the windows. Shares of a credit have no such trend.
    """
    time = torch.arange(len(rewards), dtype=rewards.dtype).unsqueeze(1)
    time = time - time.mean()
    slope = (time * rewards).sum(dim=0) / time.square().sum()  # (M,)
    return rewards - rewards.mean(dim=0) - time * slope
