"""The router of one layer: pooler, activation, probabilities, gates and load-balance loss.

Source: Zhang et al., Findings of EMNLP 2024, arXiv 2410.18035, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

EPSILON = 1e-6  #: lower bound of a token's norm and of a feature's deviation, as divisors


@cache
@_disable_current_modes()
def fit_gelu(numerator: int, denominator: int) -> tuple[Tensor, Tensor]:
    """(a_0 … a_m) and (b_1 … b_n) of a rational function fitted to GeLU and linear far outside.

    Iterated least squares at 1201 points of [-6, 6], in fp64. Weighted by the previous round's denominator, each round
    is linear: Σ a_j x^j − GeLU(x) · Σ b_i x^i = GeLU(x). GeLU(x) − x/2 is even, so the best b_i of odd i are 0 and the
    odd part is exact: a_1 = 1/2, a_{i+1} = b_i / 2. Only the even part is solved for; the solver would return the zeros
    as rounding errors whose sign differs between processes. The even sum Σ b_i x^i is positive, so its absolute value
    in :class:`Rational` changes nothing.

    Reconstructions: the paper fits on [-3, 3], but some features of real hidden states lie outside, where such a fit is
    unconstrained. The even part's numerator stops at the denominator's highest even order e (a_j = 0 for j > e + 1, and
    b_n = 0 for odd n, until training moves them): with a_6 next to b_4, Ra would grow quadratically. As it is, Ra(x)
    approaches x/2 + a_e / b_e. Largest error for orders 6 and 5: 0.004 on [-6, 6], 0.02 on [-10, 10].
    """
    x = torch.linspace(-6, 6, 1201, dtype=torch.float64, device="cpu")
    target, weights = F.gelu(x) - x / 2, torch.ones_like(x)
    even = denominator - denominator % 2
    above = torch.stack([x**j for j in range(0, even + 1, 2)], dim=1)  # (1201, e / 2 + 1)
    below = torch.stack([x**i for i in range(2, even + 1, 2)], dim=1)  # (1201, e / 2)
    system = torch.cat([above, -target.unsqueeze(1) * below], dim=1)  # (1201, e + 1)
    for _ in range(10):
        solved = torch.linalg.lstsq(system * weights.unsqueeze(1), target * weights).solution
        even_a, even_b = solved.split([above.shape[1], below.shape[1]])
        weights = 1 / (1 + (below @ even_b).abs())
    a, b = x.new_zeros(numerator + 1), x.new_zeros(denominator)
    a[: even + 1 : 2], b[1::2] = even_a, even_b
    a[1], a[3 : even + 2 : 2] = 0.5, even_b / 2
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


def weighted_sum(hidden: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t H_t, accumulated in fp32 without an fp32 copy of the states: (B, T, D), weights (B, T) -> (B, D)."""
    return (hidden * weights.to(hidden.dtype).unsqueeze(-1)).sum(dim=1, dtype=torch.float32)


class SelfAttentionPool(nn.Module):
    """u = H w, α = softmax of u over the prompt's tokens, h = αᵀ H: (B, T, D) -> (B, D).

    w starts as 0, which is the mean (a reconstruction: the paper gives no initial value).
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        scores = (hidden @ self.weight.to(hidden.dtype)).float() * scale  # (B, T, D) @ (D,) -> (B, T)
        return weighted_sum(hidden, scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) * scale)


def average_pool(hidden: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """Mean over the prompt's tokens: (B, T, D) -> (B, D)."""
    return weighted_sum(hidden, mask / mask.sum(dim=1, keepdim=True) * scale)


def max_pool(hidden: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """Largest value of each feature over the prompt's tokens: (B, T, D) -> (B, D)."""
    scaled = hidden * scale.to(hidden.dtype).unsqueeze(-1)
    return scaled.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(dim=1)


def last_token_pool(hidden: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """The prompt's last token: (B, T, D) -> (B, D)."""
    rows = torch.arange(len(hidden), device=hidden.device)
    last = mask.long().cumsum(dim=1).argmax(dim=1)  # argmax gives the first maximum: (B, T) -> (B,)
    return hidden[rows, last] * scale[rows, last].unsqueeze(-1)


#: Pools the prompts' hidden states to (B, D). Arguments: hidden (B, T, D), mask (B, T), scale of tokens (B, T) in fp32.
Pooler = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Constructors of poolers, which take the width D.
POOLERS: dict[str, Callable[[int], Pooler]] = {
    "self_attention": SelfAttentionPool,
    "average": lambda width: average_pool,
    "max": lambda width: max_pool,
    "last_token": lambda width: last_token_pool,
}
#: Elementwise activations without parameters, besides :class:`Rational`.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class Router(nn.Module):
    """p = softmax(f(z) W_r): hidden states (B, T, D) and prompt mask (B, T) -> probabilities (B, N), in fp32.

    W_r starts Gaussian with standard deviation 0.02 (a reconstruction). The states stay in their own dtype, so the
    backward pass keeps no fp32 copy of them.

    Args:
        width: D.
        choices: N.
        pooler: h, pools the tokens of a prompt; may have parameters. Defaults to the paper's self-attention pooler.
        activation: f, elementwise; may have parameters. Defaults to the paper's rational function.
        standardized: divide every token by its root mean square, pool, and take z = (h − mean) / deviation for each
            feature, with the constants of :meth:`standardize`; else z = h, as published. This is a reconstruction:
            hidden states of real decoders grow by orders of magnitude over the layers and have a few huge features
            that are the same in all prompts, which otherwise force the same choice, with probabilities of 0 and 1.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        width: int,
        choices: int,
        pooler: Pooler | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        *,
        standardized: bool = True,
    ):
        super().__init__()
        self.pooler = pooler or SelfAttentionPool(width)
        self.activation = activation or Rational()
        self.projection = nn.Linear(width, choices, bias=False)
        nn.init.normal_(self.projection.weight, std=0.02)
        self.standardized = standardized
        if standardized:
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("deviation", torch.ones(width))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.choose(self.pool(hidden, mask))  # (B, T, D) -> (B, D) -> (B, N)

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Pool each prompt into one vector, in fp32: (B, T, D), mask (B, T) -> (B, D)."""
        with torch.autocast(hidden.device.type, enabled=False):
            scale = torch.ones(hidden.shape[:2], device=hidden.device)  # (B, T)
            if self.standardized:
                norm = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)  # (B, T, D) -> (B, T)
                scale = hidden.shape[-1] ** 0.5 / norm.clamp_min(EPSILON)
            return self.pooler(hidden, mask, scale).float()

    def choose(self, pooled: Tensor) -> Tensor:
        """Probabilities of the modules from pooled prompts: (B, D) -> (B, N)."""
        with torch.autocast(pooled.device.type, enabled=False):
            if self.standardized:
                pooled = (pooled - self.mean) / self.deviation
            return self.projection(self.activation(pooled)).softmax(dim=-1)  # (B, D) -> (B, N)

    @torch.no_grad()
    def standardize(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the constants ``mean`` (D,) and ``deviation`` (D,), taken from pooled prompts.

        Deviations are at least a hundredth of their median, so that rounding in a near-constant feature is not blown
        up.
        """
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp_min(max(0.01 * float(deviation.median()), EPSILON)))


def scaled_gates(probabilities: Tensor, k: int) -> Tensor:
    """Keep the k largest of each row, scaled to sum to k: (B, N) -> (B, N). A uniform row with k = N gives ones.

    With k = 1 the gate is the constant 1, and only the load-balance loss trains the router.
    """
    kept = _largest(probabilities, k) * probabilities
    return k * kept / kept.sum(dim=-1, keepdim=True)


def straight_through_gates(probabilities: Tensor, k: int) -> Tensor:
    """1 for the k largest of each row, with the gradient of their probability, else 0: (B, N) -> (B, N)."""
    return _largest(probabilities, k) * (1 + (probabilities - probabilities.detach()))


GATES: dict[str, Callable[[Tensor, int], Tensor]] = {"scaled": scaled_gates, "straight_through": straight_through_gates}


def _largest(probabilities: Tensor, k: int) -> Tensor:
    return torch.zeros_like(probabilities).scatter(1, probabilities.topk(k).indices, 1.0)


def load_balance(layers: Sequence[Tensor], average: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
    """Σ over layers of N · Σ_i f_i p̂_i, which is 1 for an even layer.

    f is the share of prompts with arg-max i, p̂ the mean probability.

    Args:
        layers: the probabilities (B, N) of each layer, of the prompts of this process.
        average: the mean over processes; that of the results is the value for the prompts of all.
    """
    choices = layers[0].shape[1]
    counts = torch.stack([torch.bincount(p.argmax(dim=-1), minlength=choices) for p in layers])  # (L, N)
    counts = average(counts.float())
    shares = counts / counts.sum(dim=1, keepdim=True)
    means = torch.stack([p.sum(dim=0) for p in layers]) / counts.sum(dim=1, keepdim=True)  # (L, N)
    return choices * (shares * means).sum()
