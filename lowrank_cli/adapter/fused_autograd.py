"""Training passes: frozen linears that read one input, with their low-rank updates, as one autograd function.

For linears j with updates i, where γ = w ⊙ g and c scales the rows (1 unless magnitudes are trained):

    y_j = c_j ⊙ (W_j x + Σ_i s_i · B_i (γ_i ⊙ (A_i drop(x)))) + bias_j

Saved against one graph node for each operation: all A are multiplied at once, and so are their gradients; one dropout
mask serves all; gradients of the input accumulate inside matrix products; no dropped-out copy of the input is kept,
only the mask (one byte for each number). If no A trains, the input is not kept either: the gradient of B needs only
A_i drop(x), R numbers for each token instead of I.
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

LANES = 4  #: 16-bit draws in one 64-bit number
STEPS = 1 << 16  #: values of a draw: the dropout probability is rounded to multiples of 1 / STEPS


def dropout_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """A mask in the shape of ``x``, True for what dropout keeps, and the probability to be kept.

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
    """The terms of one update."""

    a: Tensor  #: A, (R, I)
    b: Tensor  #: B, (O, R)
    gate: Tensor | None  #: γ, broadcasts to (B, T, R); None: 1
    row_scale: Tensor | None  #: c, (O,); None: 1
    scale: float  #: s
    dropout: float  #: probability p


class FrozenLinear(NamedTuple):
    """A frozen linear, W (O, I) and bias (O,), and its updates, each with the span that it covers."""

    weight: Tensor
    bias: Tensor | None
    updates: Sequence[tuple[Terms, Span | None]]

    @property
    def dropout(self) -> float:
        """The dropout probability, the same for all updates."""
        return self.updates[0][0].dropout


class Recompute(NamedTuple):
    """How the backward pass computes an input again: ``function(*sources)``."""

    function: Callable[..., Tensor]
    sources: tuple[Tensor, ...]

    def attach_to(self, x: Tensor) -> None:
        """Make :func:`recompute_of` return this for ``x``, until ``x`` is changed in place."""
        x._recompute = self, x._version  # type: ignore[attr-defined]


def recompute_of(x: Tensor) -> Recompute | None:
    """How to compute ``x`` again, if that was attached to it."""
    recompute, version = getattr(x, "_recompute", (None, 0))
    return recompute if version == x._version else None


def fused_outputs(x: Tensor, linears: Sequence[FrozenLinear], recompute: Recompute | None = None) -> tuple[Tensor, ...]:
    """y (B, T, O) of every linear for ``x`` (B, T, I), in the dtype of the weights, with one dropout mask for all.

    With ``recompute``, or if no A takes a gradient, the backward pass keeps the mask but not ``x``.
    """
    p, x = linears[0].dropout, x.to(linears[0].weight.dtype)
    mask, kept = dropout_mask(x, p) if p else (None, 1.0)
    plan = tuple(tuple((span, terms.scale / kept) for terms, span in linear.updates) for linear in linears)
    tensors: list[Tensor | None] = []
    for linear in linears:
        tensors += [linear.weight, linear.bias]
        for terms, _ in linear.updates:
            tensors += [terms.a, terms.b, terms.gate, terms.row_scale]
    result: tuple[Tensor, ...] = FusedLinears.apply(x, mask, plan, recompute, *tensors)  # type: ignore[no-untyped-call]
    return result


class FusedLinears(torch.autograd.Function):
    """The function of the module's docstring.

    Inputs: x (…, I), the dropout mask (…, I), the plan, ``recompute``, then for each linear W and bias, followed by
    A, B, γ and c of each of its updates. Gradients, in the dtype of x: of x, B, γ and c, and of A where needed, which
    alone uses x. The gradient of c is computed from y, which is saved anyway, and is 0 where c is. Not twice
    differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        plan: Plan,
        recompute: Recompute | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        linears, rows = _grouped(plan, tensors), x.shape[:-1]
        flat = x.reshape(-1, x.shape[-1])  # (…, I) -> (N, I)
        hidden = _masked(flat, mask) @ _stacked_a(linears).t()  # (N, I) @ (I, ΣR) -> (N, ΣR)
        ys, scaled, start = [], [], 0
        for weight, bias, updates in linears:
            row_scale = _row_scale(weight, updates)
            y = F.linear(flat, weight, bias if row_scale is None else None)  # (N, I) @ (I, O) -> (N, O)
            for span, scale, a, b, gate, _ in updates:
                h = _gated(hidden[:, start : start + len(a)], gate, rows)
                take(y, span).addmm_(h, b.t(), alpha=scale)  # += (N, R) @ (R, O)
                start += len(a)
            # No view for autograd: some models (Falcon) change an output in place.
            ys.append(torch.ops.aten._unsafe_view(y, (*rows, len(weight))))  # (N, O) -> (…, O)
            if row_scale is not None:
                y.mul_(row_scale)
                scaled.append(ys[-1] if bias is None else ys[-1].add_(bias))
        needs_grad = ctx.needs_input_grad[-len(tensors) :]
        ctx.trains_a = any(needs_grad[index] for index in _indices_of_a(plan))
        sources = () if not ctx.trains_a else (x,) if recompute is None else recompute.sources
        ctx.plan, ctx.recompute, ctx.sources = plan, recompute and recompute.function, len(sources)
        ctx.save_for_backward(mask, hidden, *sources, *tensors, *scaled)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        mask, hidden, *tensors = ctx.saved_tensors
        sources, tensors = tensors[: ctx.sources], tensors[ctx.sources :]
        linears, rows = _grouped(ctx.plan, tensors), grad_ys[0].shape[:-1]
        scaled = iter(tensors[sum(2 + 4 * len(updates) for updates in ctx.plan) :])
        grad_hidden, start = torch.empty_like(hidden), 0  # (N, ΣR)
        grads: list[Tensor | None] = []  # of ``tensors``
        grad_products = []  # of each W x, (N, O)
        for (weight, bias, updates), grad_y in zip(linears, grad_ys, strict=True):
            g = grad_y.reshape(len(hidden), -1)  # (…, O) -> (N, O)
            row_scale, grad_rows = _row_scale(weight, updates), None
            if row_scale is not None:
                y = next(scaled).view(g.shape)
                product = g * (y if bias is None else y - bias)
                grad_rows = (product.sum(dim=0) / row_scale).masked_fill_(row_scale == 0, 0)  # (N, O) -> (O,)
                g = torch.mul(g, row_scale, out=product)
            grad_products.append(g)
            grads += [None, None]
            for span, scale, a, b, gate, c in updates:
                ranks, g_span = slice(start, start + len(a)), take(g, span)
                h, grad_h = hidden[:, ranks], (g_span @ b).mul_(scale)  # (N, O) @ (O, R) -> (N, R)
                grad_b = ((_gated(h, gate, rows) * scale).t() @ g_span).t()  # ((R, N) @ (N, O))ᵀ -> (O, R)
                grad_gate = None if gate is None else (grad_h * h).view(*rows, -1).sum_to_size(gate.shape)
                grad_hidden[:, ranks] = _gated(grad_h, gate, rows)
                grad_c = None if c is None or grad_rows is None else take(grad_rows, span)
                grads += [None, grad_b, grad_gate, grad_c]
                start += len(a)
        if ctx.trains_a:
            x = sources[0] if ctx.recompute is None else ctx.recompute(*sources).to(hidden.dtype)
            flat = x.reshape(-1, x.shape[-1])  # (…, I) -> (N, I)
            grad_down, indices = grad_hidden.t() @ _masked(flat, mask), _indices_of_a(ctx.plan)  # -> (ΣR, I)
            for index, grad_a in zip(indices, torch.split(grad_down, [len(tensors[i]) for i in indices]), strict=True):
                grads[index] = grad_a
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, *grads
        grad_x = _masked(grad_hidden @ _stacked_a(linears), mask)  # (N, ΣR) @ (ΣR, I) -> (N, I)
        for g, (weight, _, _) in zip(grad_products, linears, strict=True):
            grad_x.addmm_(g, weight)  # += (N, O) @ (O, I): in a product this large the addition is free
        return grad_x.view(*rows, grad_x.shape[-1]), None, None, None, *grads


#: For each linear, span and scale of each of its updates.
Plan = tuple[tuple[tuple[Span | None, float], ...], ...]


class _Update(NamedTuple):
    span: Span | None
    scale: float
    a: Tensor
    b: Tensor
    gate: Tensor | None
    row_scale: Tensor | None


def _grouped(plan: Plan, tensors: Sequence[Any]) -> list[tuple[Tensor, Tensor | None, list[_Update]]]:
    """W, bias and updates of each linear."""
    rest, linears = iter(tensors), []
    for entry in plan:
        weight, bias = next(rest), next(rest)
        updates = [_Update(*update, next(rest), next(rest), next(rest), next(rest)) for update in entry]
        linears.append((weight, bias, updates))
    return linears


def _indices_of_a(plan: Plan) -> list[int]:
    """The index of each update's A among the tensors."""
    indices, start = [], 0
    for updates in plan:
        indices += [start + 2 + 4 * number for number in range(len(updates))]
        start += 2 + 4 * len(updates)
    return indices


def _stacked_a(linears: Sequence[tuple[Tensor, Tensor | None, list[_Update]]]) -> Tensor:
    """A of all updates, (ΣR, I)."""
    downs = [update.a for _, _, updates in linears for update in updates]
    return downs[0] if len(downs) == 1 else torch.cat(downs)


def _masked(flat: Tensor, mask: Tensor | None) -> Tensor:
    return flat if mask is None else flat * mask.view_as(flat)


def _gated(h: Tensor, gate: Tensor | None, rows: Sequence[int]) -> Tensor:
    """γ ⊙ h, (N, R), with γ broadcasting to (*rows, R)."""
    return h if gate is None else (h.view(*rows, -1) * gate).view(h.shape)


def _row_scale(weight: Tensor, updates: Sequence[_Update]) -> Tensor | None:
    """c of a whole linear, (O,); None if no update scales rows."""
    if all(update.row_scale is None for update in updates):
        return None
    if len(updates) == 1 and updates[0].span is None:
        return updates[0].row_scale
    whole = weight.new_ones(len(weight))
    for update in updates:
        if update.row_scale is not None:
            take(whole, update.span).copy_(update.row_scale)
    return whole
