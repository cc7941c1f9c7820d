"""What one layer's router computes: pooler, activation, probabilities, gates and the load-balance loss.

Source: MiLoRA (Zhang et al., Findings of EMNLP 2024, arXiv 2410.18035), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@cache
def fit_gelu(numerator: int, denominator: int) -> tuple[Tensor, Tensor]:
    """(a_0 … a_m) and (b_1 … b_n) of a rational function of these orders, fitted to GeLU on [-3, 3].

    Least squares at 601 points, in fp64. Weighted by the denominator of the round before, each round is linear:
    Σ a_j x^j − GeLU(x) · Σ b_i x^i = GeLU(x). GeLU(x) − x/2 is even, so that (``numerator`` > ``denominator`` > 1) the
    best b_i of odd i are 0 and the odd part is exact: a_1 = 1/2, a_{i+1} = b_i / 2. Only the even part is solved for;
    left to the solver, the zeros would be rounding of another sign in each process. The even sum Σ b_i x^i comes out
    positive, so that its absolute value in :class:`Rational` is itself, and the fit is the least-squares one up to a
    few per cent of its residuals. Error at most 1.2e-4 for orders 6 and 5.
    """
    x = torch.linspace(-3, 3, 601, dtype=torch.float64, device="cpu")
    target, weights = F.gelu(x) - x / 2, torch.ones_like(x)
    above = torch.stack([x**j for j in range(0, numerator + 1, 2)], dim=1)  # (601, m // 2 + 1)
    below = torch.stack([x**i for i in range(2, denominator + 1, 2)], dim=1)  # (601, n // 2)
    system = torch.cat([above, -target.unsqueeze(1) * below], dim=1)  # (601, m // 2 + 1 + n // 2)
    for _ in range(10):
        solved = torch.linalg.lstsq(system * weights.unsqueeze(1), target * weights).solution
        even_a, even_b = solved.split([above.shape[1], below.shape[1]])
        weights = 1 / (1 + (below @ even_b).abs())
    a, b = x.new_zeros(numerator + 1), x.new_zeros(denominator)
    a[::2], b[1::2] = even_a, even_b
    a[1], a[3 : denominator + 2 : 2] = 0.5, even_b / 2
    return a.float(), b.float()


class Rational(nn.Module):
    """Learnable activation Ra(x) = Σ_{j=0..m} a_j x^j / (1 + |Σ_{i=1..n} b_i x^i|), elementwise, starting as GeLU."""

    def __init__(self, numerator: int = 6, denominator: int = 5) -> None:
        super().__init__()
        a, b = fit_gelu(numerator, denominator)
        self.numerator = nn.Parameter(a.clone())  # (m + 1,)
        self.denominator = nn.Parameter(b.clone())  # (n,)

    def forward(self, x: Tensor) -> Tensor:
        above = torch.zeros_like(x)
        for a in self.numerator.flip(0):
            above = above * x + a
        below = torch.zeros_like(x)
        for b in self.denominator.flip(0):
            below = (below + b) * x
        return above / (1 + below.abs())


class SelfAttentionPool(nn.Module):
    """u = H w, α = softmax of u over the prompt's tokens, h = αᵀ H: (B, T, D), mask (B, T) -> (B, D).

    w starts as 0, which is the mean (a reconstruction: the paper gives no initial value).
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        scores = (hidden @ self.weight.to(hidden.dtype)).float()  # (B, T, D) @ (D,) -> (B, T)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return torch.einsum("bt,btd->bd", weights.to(hidden.dtype), hidden)


def average_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the prompt's tokens: (B, T, D), mask (B, T) -> (B, D)."""
    return hidden.masked_fill(~mask.unsqueeze(-1), 0).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def max_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Largest value of each feature over the prompt's tokens: (B, T, D), mask (B, T) -> (B, D)."""
    return hidden.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(dim=1)


def last_token_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The prompt's last token: (B, T, D), mask (B, T) -> (B, D)."""
    last = mask.long().cumsum(dim=1).argmax(dim=1)  # the first place where the count is complete: (B, T) -> (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


#: By name: what makes a pooler for hidden states of a width. A pooler maps (B, T, D) and mask (B, T) to (B, D).
POOLERS: dict[str, Callable[[int], Callable[[Tensor, Tensor], Tensor]]] = {
    "self_attention": SelfAttentionPool,
    "average": lambda width: average_pool,
    "max": lambda width: max_pool,
    "last_token": lambda width: last_token_pool,
}
#: By name: elementwise activations without parameters, beside :class:`Rational`.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class Router(nn.Module):
    """p = softmax(f(pool(H)) W_r): hidden states (B, T, D) and prompt mask (B, T) -> probabilities (B, N), in fp32.

    ``pooler`` maps hidden states and mask to (B, D), ``activation`` f is elementwise; either may be a module with
    parameters. They default to the paper's self-attention pooler and rational function. The states are pooled in their
    own dtype, so that no fp32 copy of them waits for the backward pass. W_r starts Gaussian with standard deviation
    0.02 (a reconstruction).
    """

    def __init__(
        self,
        width: int,
        choices: int,
        pooler: Callable[[Tensor, Tensor], Tensor] | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.pooler = pooler or SelfAttentionPool(width)
        self.activation = activation or Rational()
        self.projection = nn.Linear(width, choices, bias=False)
        nn.init.normal_(self.projection.weight, std=0.02)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = self.pooler(hidden, mask).float()  # (B, T, D) -> (B, D)
            return self.projection(self.activation(pooled)).softmax(dim=-1)  # (B, D) -> (B, N)


def scaled_gates(probabilities: Tensor, k: int) -> Tensor:
    """Keep the k largest of each row, scaled to sum to k: (B, N) -> (B, N). An all-equal row of k = N gives ones.

    With k = 1 the gate is the constant 1, so that only the load-balance loss reaches the router.
    """
    kept = _largest(probabilities, k) * probabilities
    return k * kept / kept.sum(dim=-1, keepdim=True)


def straight_through_gates(probabilities: Tensor, k: int) -> Tensor:
    """Exactly 1 for the k largest of each row, with the gradient of their probability; else 0: (B, N) -> (B, N)."""
    return _largest(probabilities, k) * (1 + (probabilities - probabilities.detach()))


GATES: dict[str, Callable[[Tensor, int], Tensor]] = {"scaled": scaled_gates, "straight_through": straight_through_gates}


def _largest(probabilities: Tensor, k: int) -> Tensor:
    return torch.zeros_like(probabilities).scatter(1, probabilities.topk(k).indices, 1.0)


def load_balance(probabilities: Tensor) -> Tensor:
    """N · Σ_i f_i p̂_i of one layer: f the share of prompts whose arg-max is i, p̂ the mean probability. 1 if even."""
    choices = probabilities.shape[1]
    shares = torch.bincount(probabilities.argmax(dim=-1), minlength=choices) / len(probabilities)  # (N,)
    return choices * (shares * probabilities.mean(dim=0)).sum()
