"""Components of the frozen weight itself, trained: singular triplets instead of random directions.

W = U S Vᵀ; a window I of its components starts as B₀ = (U S^½)_I, A₀ = (S^½ Vᵀ)_I (up to the scale s), and

    y = (W − s·B₀A₀) x + s·BA x  =  W x + s·(BA − B₀A₀) x  =  W x + s·[B − B₀ | B₀] [A ; A − A₀] x

The last form is what is computed: the same function and the same gradients as training the components beside a frozen
rest, but the stored W is never touched. So a fresh module changes nothing, not even by rounding; switching it off
needs no restoring; an update far below the precision of a bf16 W is not lost; and it is a plain LoRA of rank 2R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_cli.adapter.linear import LowRank

#: Smaller side of a matrix up to which the decomposition is exact (LAPACK: about 1 s at 768 × 2048 on one core).
EXACT = 1024


class Window(LowRank):
    """A low-rank module that replaces components of the weight (O, I): s·(BA − B₀A₀).

    The factors at the start are saved with the trained ones: signs and order of singular vectors differ between
    machines, so a decomposition done again would not be the same function.
    """

    rank_axes = {}  # a rank stands twice in the update, trained and at the start

    start_a: Tensor  #: A₀ (R, I), fp32
    start_b: Tensor  #: B₀ (O, R), fp32

    def constants(self) -> dict[str, Tensor]:
        return {"lora_A.start": self.start_a, "lora_B.start": self.start_b}

    def down(self) -> Tensor:
        return torch.cat((self.lora_a, self.lora_a - self.start_a))  # (R, I) -> (2R, I)

    def up(self) -> Tensor:
        return torch.cat((self.lora_b - self.start_b, self.start_b), dim=1)  # (O, R) -> (O, 2R)

    @torch.no_grad()
    def take(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        """Start from components u (O, R), s (R,), v (R, I): B₀ = u (s / scale)^½, A₀ = (s / scale)^½ v."""
        root = (s / self.scale).sqrt()
        self.register_buffer("start_a", root.unsqueeze(1) * v, persistent=False)  # (R, I)
        self.register_buffer("start_b", u * root, persistent=False)  # (O, R)
        self.lora_a.data, self.lora_b.data = self.start_a.clone(), self.start_b.clone()


class Principal(Window):
    """The components of the largest singular values."""

    def attach(self, weight: Tensor, bias: Tensor | None) -> None:
        self.take(*principal(weight, self.rank))


@torch.no_grad()
def principal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading components u (O, R), s (R,), v (R, I) of ``weight`` (O, I), fp32.

    Exact where the smaller side is at most ``EXACT``; above it randomized, with 8 directions to spare and 16 power
    iterations (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    weight = weight.float()
    if min(weight.shape) <= EXACT:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vt = torch.svd_lowrank(weight, q=rank + 8, niter=16)
        v = vt.t()
    return u[:, :rank], s[:rank], v[:rank]
