"""Training passes: frozen linears that read one input, together with their low-rank updates, as one function.

For linears j and updates i of them, with γ = w ⊙ g between the products and c the scale of the rows (1 unless
magnitudes are trained):

    y_j = c_j ⊙ (W_j x + Σ_i s_i · B_i (γ_i ⊙ (A_i drop(x)))) + bias_j

What this saves against one autograd graph for each operation: one product for the A of all updates and one for their
gradients, one dropout mask, gradients of the input added up inside matrix products, and no dropped copy of the input
is kept, only the mask (a byte for each number). Where no A trains, the input itself is not kept either: the gradient of
B needs A_i drop(x) alone, R numbers for each token instead of I.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowrank_cli.adapter.spans import Span, take

LANES = 4  #: draws of 16 bits in one number of 64
STEPS = 1 << 16  #: of a draw: the probability of dropout is rounded to multiples of 1 / STEPS


def kept_by_dropout(x: Tensor, p: float) -> tuple[Tensor, float]:
    """What dropout keeps of ``x``, as a mask of its shape, and the probability to be kept.

    On a CPU ``bernoulli_`` would take several times as long as the products of a low-rank update.
    """
    if x.device.type != "cpu":
        mask = torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)
        return mask.bernoulli_(1 - p), 1 - p
    dropped = round(p * STEPS)
    bits = torch.empty(-(-x.numel() // LANES), dtype=torch.int64).random_(-(2**63), None)
    draws = bits.view(torch.int16)[: x.numel()].view(x.shape)
    return draws >= dropped - STEPS // 2, 1 - dropped / STEPS


@dataclass(frozen=True)
class Terms:
    """One update: A (R, I), B (O, R), the gate γ, which broadcasts to (B, T, R), the row factors c (O,), s and p."""

    a: Tensor
    b: Tensor
    gate: Tensor | None
    stretch: Tensor | None
    strength: float
    dropout: float


class Frozen(NamedTuple):
    """A frozen linear, W (O, I) and bias (O,), and its updates with the spans that they cover."""

    weight: Tensor
    bias: Tensor | None
    updates: Sequence[tuple[Terms, Span | None]]

    @property
    def dropout(self) -> float:
        """The probability of dropout, which all updates share."""
        return self.updates[0][0].dropout


class Remake(NamedTuple):
    """How an input is computed again: ``function(*sources)``."""

    function: Callable[..., Tensor]
    sources: tuple[Tensor, ...]

    def remember(self, x: Tensor) -> None:
        """Let ``x`` say how it was computed, until it is changed in place."""
        x._remake = self, x._version  # type: ignore[attr-defined]


def remake_of(x: Tensor) -> Remake | None:
    """How ``x`` is computed again, if it says so."""
    remake, version = getattr(x, "_remake", (None, 0))
    return remake if version == x._version else None


def outputs(x: Tensor, linears: Sequence[Frozen], remake: Remake | None = None) -> tuple[Tensor, ...]:
    """y (B, T, O) of every linear for ``x`` (B, T, I), in the dtype of the weights; dropout is the same for all.

    With ``remake``, which computes ``x`` again, or where no A takes a gradient, nothing of its size is saved for the
    backward pass, but the mask.
    """
    p, x = linears[0].dropout, x.to(linears[0].weight.dtype)
    mask, kept = kept_by_dropout(x, p) if p else (None, 1.0)
    plan = tuple(tuple((span, terms.strength / kept) for terms, span in linear.updates) for linear in linears)
    tensors: list[Tensor | None] = []
    for linear in linears:
        tensors += [linear.weight, linear.bias]
        for terms, _ in linear.updates:
            tensors += [terms.a, terms.b, terms.gate, terms.stretch]
    found: tuple[Tensor, ...] = FusedLinears.apply(x, mask, plan, remake, *tensors)  # type: ignore[no-untyped-call]
    return found


class FusedLinears(torch.autograd.Function):
    """The function, of x (…, I), the dropout mask (…, I), spans and strengths of updates, what remakes x, and tensors.

    These are W and bias of each linear, each followed by A, B, γ and c of its updates. There are gradients for x, A, B,
    γ and c, in the dtype of x, and no second ones; of A only where one is asked for, which alone needs x. That of c is
    taken from y, which others save too, and 0 where c is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        plan: Plan,
        remake: Remake | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        linears, rows = _grouped(plan, tensors), x.shape[:-1]
        flat = x.reshape(-1, x.shape[-1])  # (…, I) -> (N, I)
        hidden = _dropped(flat, mask) @ _stacked(linears).t()  # (N, I) @ (I, ΣR) -> (N, ΣR)
        ys, stretched, start = [], [], 0
        for weight, bias, updates in linears:
            factor = _factor(weight, updates)
            y = F.linear(flat, weight, bias if factor is None else None)  # (N, I) @ (I, O) -> (N, O)
            for span, strength, a, b, gate, _ in updates:
                h = _gated(hidden[:, start : start + len(a)], gate, rows)
                take(y, span).addmm_(h, b.t(), alpha=strength)  # += (N, R) @ (R, O)
                start += len(a)
            # No view for autograd: some models (Falcon) go on to change an output in place.
            ys.append(torch.ops.aten._unsafe_view(y, (*rows, len(weight))))  # (N, O) -> (…, O)
            if factor is not None:
                y.mul_(factor)
                stretched.append(ys[-1] if bias is None else ys[-1].add_(bias))
        asked = ctx.needs_input_grad[-len(tensors) :]
        ctx.trains_a = any(asked[index] for index in _indices_of_a(plan))
        sources = () if not ctx.trains_a else (x,) if remake is None else remake.sources
        ctx.plan, ctx.remake, ctx.sources = plan, remake and remake.function, len(sources)
        ctx.save_for_backward(mask, hidden, *sources, *tensors, *stretched)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mask, hidden, *tensors = ctx.saved_tensors
        sources, tensors = tensors[: ctx.sources], tensors[ctx.sources :]
        linears, rows = _grouped(ctx.plan, tensors), gradients[0].shape[:-1]
        stretched = iter(tensors[sum(2 + 4 * len(updates) for updates in ctx.plan) :])
        to_hidden, start = torch.empty_like(hidden), 0  # (N, ΣR)
        found: list[Tensor | None] = []  # for ``tensors``
        towards = []  # what reaches each W x, (N, O)
        for (weight, bias, updates), gradient in zip(linears, gradients, strict=True):
            g = gradient.reshape(len(hidden), -1)  # (…, O) -> (N, O)
            factor, to_factor = _factor(weight, updates), None
            if factor is not None:
                y = next(stretched).view(g.shape)
                product = g * (y if bias is None else y - bias)
                to_factor = (product.sum(dim=0) / factor).masked_fill_(factor == 0, 0)  # (N, O) -> (O,)
                g = torch.mul(g, factor, out=product)
            towards.append(g)
            found += [None, None]
            for span, strength, a, b, gate, stretch in updates:
                ranks, own = slice(start, start + len(a)), take(g, span)
                h, to_h = hidden[:, ranks], (own @ b).mul_(strength)  # (N, O) @ (O, R) -> (N, R)
                to_b = ((_gated(h, gate, rows) * strength).t() @ own).t()  # ((R, N) @ (N, O))ᵀ -> (O, R)
                to_gate = None if gate is None else (to_h * h).view(*rows, -1).sum_to_size(gate.shape)
                to_hidden[:, ranks] = _gated(to_h, gate, rows)
                to_stretch = None if stretch is None or to_factor is None else take(to_factor, span)
                found += [None, to_b, to_gate, to_stretch]
                start += len(a)
        if ctx.trains_a:
            x = sources[0] if ctx.remake is None else ctx.remake(*sources).to(hidden.dtype)
            flat = x.reshape(-1, x.shape[-1])  # (…, I) -> (N, I)
            to_down, indices = to_hidden.t() @ _dropped(flat, mask), _indices_of_a(ctx.plan)  # -> (ΣR, I)
            for index, to_a in zip(indices, torch.split(to_down, [len(tensors[i]) for i in indices]), strict=True):
                found[index] = to_a
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, *found
        to_x = _dropped(to_hidden @ _stacked(linears), mask)  # (N, ΣR) @ (ΣR, I) -> (N, I)
        for g, (weight, _, _) in zip(towards, linears, strict=True):
            to_x.addmm_(g, weight)  # += (N, O) @ (O, I): adding costs no time of its own in a product this large
        return to_x.view(*rows, to_x.shape[-1]), None, None, None, *found


#: For each linear, the span and the strength of each of its updates.
Plan = tuple[tuple[tuple[Span | None, float], ...], ...]


class _Update(NamedTuple):
    span: Span | None
    strength: float
    a: Tensor
    b: Tensor
    gate: Tensor | None
    stretch: Tensor | None


def _grouped(plan: Plan, tensors: Sequence[Any]) -> list[tuple[Tensor, Tensor | None, list[_Update]]]:
    """W, bias and updates of each linear."""
    rest, found = iter(tensors), []
    for updates in plan:
        weight, bias = next(rest), next(rest)
        made = [_Update(*update, next(rest), next(rest), next(rest), next(rest)) for update in updates]
        found.append((weight, bias, made))
    return found


def _indices_of_a(plan: Plan) -> list[int]:
    """Where the A of each update is among the tensors."""
    indices, start = [], 0
    for updates in plan:
        indices += [start + 2 + 4 * number for number in range(len(updates))]
        start += 2 + 4 * len(updates)
    return indices


def _stacked(linears: Sequence[tuple[Tensor, Tensor | None, list[_Update]]]) -> Tensor:
    """A of all updates, (ΣR, I)."""
    downs = [update.a for _, _, updates in linears for update in updates]
    return downs[0] if len(downs) == 1 else torch.cat(downs)


def _dropped(flat: Tensor, mask: Tensor | None) -> Tensor:
    return flat if mask is None else flat * mask.view_as(flat)


def _gated(h: Tensor, gate: Tensor | None, rows: Sequence[int]) -> Tensor:
    """γ ⊙ h, (N, R), with γ broadcasting to (*rows, R)."""
    return h if gate is None else (h.view(*rows, -1) * gate).view(h.shape)


def _factor(weight: Tensor, updates: Sequence[_Update]) -> Tensor | None:
    """c of a linear, (O,); None where nothing stretches it."""
    if all(update.stretch is None for update in updates):
        return None
    if len(updates) == 1 and updates[0].span is None:
        return updates[0].stretch
    factor = weight.new_ones(len(weight))
    for update in updates:
        if update.stretch is not None:
            take(factor, update.span).copy_(update.stretch)
    return factor
