"""Statistics of the routers' choices over prompts: which modules, how varied, and how confident."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_cli.adapter.routing.router import scaled_gates

SATURATED = 0.9  #: probability of one module above which the router gets almost no gradient
TIED = 1e-3  #: gap between the last module kept and the first dropped, below which rounding decides


class Choices:
    """Choices of k among N modules in each of L layers, summed over prompts.

    Attributes:
        sets: (L, 2**N), prompts counted by the set chosen, with module i as bit i.
        sums: (L, 3), sums over prompts of the largest gate (k · p / Σ_kept p), of being saturated and of being tied.
    """

    def __init__(self, layers: int, modules: int, k: int):
        self.modules, self.k = modules, k
        self.sets = torch.zeros(layers, 2**modules, dtype=torch.float64)
        self.sums = torch.zeros(layers, 3, dtype=torch.float64)

    @torch.no_grad()
    def add(self, layer: int, probabilities: Tensor) -> None:
        """Count the choices in ``layer`` of probabilities (B, N): the k largest, even where they are 0."""
        largest = probabilities.topk(min(self.k + 1, self.modules)).values  # (B, N) -> (B, k + 1), or (B, N)
        chosen = probabilities.topk(self.k).indices  # (B, N) -> (B, k)
        self.sets[layer] += torch.bincount((1 << chosen).sum(dim=1), minlength=2**self.modules).cpu()
        gap = largest[:, self.k - 1] - largest[:, self.k] if self.k < self.modules else torch.ones_like(largest[:, 0])
        gates = scaled_gates(probabilities, self.k).amax(dim=1)
        summed = torch.stack([gates, largest[:, 0] > SATURATED, gap < TIED])  # (3, B)
        self.sums[layer] += summed.double().sum(dim=1).cpu()

    def clear(self) -> None:
        """Reset all counts."""
        self.sets.zero_()
        self.sums.zero_()

    @property
    def prompts(self) -> int:
        return int(self.sets[0].sum())

    def shares(self) -> Tensor:
        """Share of the prompts that chose each module, (L, N)."""
        members = torch.arange(2**self.modules).unsqueeze(1) >> torch.arange(self.modules) & 1  # (2**N, N)
        return self.sets @ members.double() / self.prompts  # (L, 2**N) @ (2**N, N) -> (L, N)

    def by_layer(self) -> dict[str, list[float]]:
        """Statistics of each layer.

        The mean largest gate, the number of distinct sets, their entropy over prompts in bits (at most log2 of the
        number of prompts), and the shares of saturated and of tied prompts.
        """
        shares = self.sets / self.prompts
        gate, saturated, tied = (self.sums / self.prompts).T.tolist()
        return {
            "largest_gate": gate,
            "distinct_sets": (self.sets > 0).sum(dim=1).tolist(),
            "set_entropy": (torch.special.entr(shares).sum(dim=1) / torch.log(torch.tensor(2.0))).tolist(),
            "saturated": saturated,
            "tied": tied,
        }
