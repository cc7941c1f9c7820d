"""IDA-Softmax: the expected inverse probability of an answer over infinitely many augmented features.

Zhou et al., "Enhancing In-Context Learning via Implicit Demonstration Augmentation", ACL 2024. With h what the language
model's head (w_k, b_k) reads, and μ, Σ mean and covariance of the demonstrations' features, h̃ ~ N(h + λμ, λΣ) and

    q(y) = E[1 / p(y | h̃)] = Σ_k exp( Δw_kᵀ(h + λμ) + Δb_k + (λ/2) Δw_kᵀ Σ Δw_k ),   Δw_k = w_k − w_y, Δb_k = b_k − b_y

The prediction is argmin_y log q(y) + τ log π_y, where π_y is the share of answer y among the demonstrations. Everything
but h is known in advance: with Σ = FᵀF and logits z = W h + b,

    −log q(y) = z_y − logsumexp_k( z_k + o_yk ),   o_yk = λ (w_k − w_y)ᵀμ + (λ/2) ‖F w_k − F w_y‖²

so a query costs one sum of two (V,) vectors for each answer token, and o = 0 (λ = 0) is the plain log-softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowrank_cli.errors import UserError

#: (logits (N, V), tokens (N, C)) -> scores (N, C), higher is better; (S, N, C) for S rules :func:`together`.
TokenRule = Callable[[Tensor, Tensor], Tensor]

#: Added to each label's count for π (Laplace's rule), so that a label without a demonstration has a share too. Ours:
#: the paper's π are the plain shares.
SMOOTHING = 1
CHUNK = 8192  #: rows of the head projected at a time; bounds memory to CHUNK × R numbers


def log_softmax(logits: Tensor, tokens: Tensor) -> Tensor:
    """The plain rule: log p of each token. logits (N, V), tokens (N, C) -> (N, C)."""
    return logits.gather(1, tokens) - logits.logsumexp(dim=-1, keepdim=True)


def together(rules: Sequence[TokenRule]) -> TokenRule:
    """One rule that applies several rules to the same logits, equal ones once."""

    def apply(logits: Tensor, tokens: Tensor) -> Tensor:
        scores = {rule: rule(logits, tokens) for rule in dict.fromkeys(rules)}
        return torch.stack([scores[rule] for rule in rules])  # S × (N, C) -> (S, N, C)

    return apply


@dataclass(frozen=True)
class Statistics:
    """Statistics of the demonstrations' features and labels, fp32."""

    mean: Tensor  #: μ, (D,)
    factor: Tensor  #: F with FᵀF = Σ, (R, D); R is at most D and the number of demonstrations
    shares: Tensor  #: π, (C,), each label's smoothed share of the demonstrations


def statistics(features: Tensor, labels: Tensor, classes: int) -> Statistics:
    """Mean, factor of the covariance (divided by n, as in the paper) and class shares of features (n, D).

    The share of a label with n_y examples is (n_y + SMOOTHING) / (n + SMOOTHING · classes).

    With n > D the factor is triangular, from a QR decomposition: the same Σ with D rows.
    """
    features = features.double()
    mean = features.mean(dim=0)  # (n, D) -> (D,)
    factor = (features - mean) / len(features) ** 0.5  # (n, D)
    if factor.shape[0] > factor.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R  # (n, D) -> (D, D)
    counts = torch.bincount(labels, minlength=classes).double() + SMOOTHING  # (C,)
    return Statistics(mean.float(), factor.float(), (counts / counts.sum()).float())


def prior(shares: Tensor, tau: float) -> Tensor:
    """τ log π for shares π (C,): (C,); zeros if τ = 0.

    Raises:
        UserError: a share is 0, which no finite score can correct.
    """
    if tau == 0:
        return torch.zeros_like(shares)
    missing = (shares == 0).nonzero().flatten().tolist()
    if missing:
        raise UserError(
            f"method.tau: {tau:g}, but label {missing[0]} has no example among those that the statistics were fitted "
            f"on, so its share cannot be made up for; fit on more (method.examples), or set method.tau=0"
        )
    return tau * shares.log()


def offsets(head: Tensor, mean: Tensor, factor: Tensor, strength: float, tokens: Tensor) -> Tensor:
    """o of each answer token: head (V, D), tokens (Y,) -> (Y, V).

    Squares differences of projections, not projections, which reach thousands with real heads.
    """
    head, mean, factor = head.float(), mean.to(head.device), factor.to(head.device)
    shift = head @ mean  # (V, D) @ (D,) -> (V,)
    chosen = head[tokens] @ factor.t()  # (Y, D) @ (D, R) -> (Y, R)
    distances = [
        torch.cdist(chosen, rows @ factor.t(), compute_mode="donot_use_mm_for_euclid_dist")  # (Y, R), (c, R) -> (Y, c)
        for rows in torch.split(head, CHUNK)
    ]
    quadratic = torch.cat(distances, dim=1).square()  # (Y, V)
    return strength * (shift - shift[tokens, None]) + 0.5 * strength * quadratic


class IdaSoftmax:
    """The rule −log q(y) for the answer ``tokens``; offsets are computed once, when they are first needed.

    Rules with the same statistics (the same tensors), strength and tokens are equal.
    """

    def __init__(self, head: Tensor, mean: Tensor, factor: Tensor, strength: float, tokens: Iterable[int]):
        self.tokens = torch.tensor(sorted(set(tokens)), device=head.device)  # (Y,)
        self.strength, self._statistics = strength, (head, mean, factor)
        self._key = (strength, tuple(self.tokens.tolist()), *map(id, self._statistics))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdaSoftmax) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @cached_property
    def offsets(self) -> Tensor:
        """o of each answer token, (Y, V)."""
        return offsets(*self._statistics, self.strength, self.tokens)

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """−log q under logits (N, V) of tokens (N, C) among the answers': (N, C)."""
        indices = torch.searchsorted(self.tokens, tokens.contiguous())  # (N, C)
        columns = []
        for column in indices.unbind(dim=1):  # one answer at a time needs (N, V) numbers, not (N, C, V)
            same = bool((column == column[0]).all())
            shifted = logits + self.offsets[column[0] if same else column]  # (N, V)
            columns.append(shifted.logsumexp(dim=-1))
        return logits.gather(1, tokens) - torch.stack(columns, dim=1)
