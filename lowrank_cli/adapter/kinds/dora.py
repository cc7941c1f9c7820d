"""The low-rank module that separates magnitude and direction: DoRA (Liu et al., ICML 2024, arXiv 2402.09353)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_cli.adapter.fused_autograd import Terms
from lowrank_cli.adapter.low_rank import LowRank

#: Lower bound of the squared norms of V's rows, relative to W's: below it the Gram identity gives only rounding.
FLOOR = 1e-6
#: Lower bound for rows of zeros, whose direction is undefined.
ZERO_ROW = 1e-30


class Decomposed(LowRank):
    """y = (m / n) ⊙ (V x) + bias,   V = W + s · B diag(g) A,   n = ‖V‖ row by row (equation 5 of the paper).

    ``magnitude`` m (O,), in fp32, starts as ‖W‖, so that m / n is exactly 1. As an update of the frozen output, with
    the module gate w:

        y = W x + bias + w ⊙ ((m/n − 1) ⊙ (W x) + (m/n) ⊙ s · B (g ⊙ (A drop(x))))

    The gradient treats n as a constant (section 4.3). Dropout applies to the input of A only.

    V is never formed: n² = ‖W‖² + 2 s ⟨W, B diag(g) A⟩ + s² ‖B diag(g) A‖², from products with R columns. ‖W‖² is
    computed when the module is attached.
    """

    squares: Tensor  #: ‖W‖², (O,)

    def build(self) -> None:
        self.magnitude = nn.Parameter(self.lora_b.new_empty(len(self.lora_b)))
        self.register_buffer("squares", torch.empty_like(self.magnitude), persistent=False)

    def tensors(self) -> dict[str, nn.Parameter]:
        return super().tensors() | {"lora_magnitude_vector": self.magnitude}

    def peft_options(self) -> dict[str, Any]:
        return {"use_dora": True}

    @torch.no_grad()
    def attach(self, weight: Tensor, bias: Tensor | None) -> None:
        self.squares.copy_(torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square())  # (O, I) -> (O,)
        self.magnitude.copy_(self.squares.sqrt())

    @torch.no_grad()
    def delta_factors(self) -> tuple[Tensor, Tensor]:
        delta = self.delta()  # rescaled rows change all of W, so there are no smaller factors
        return delta, torch.eye(delta.shape[1], device=delta.device)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """n: (O,), or (B, O) with a rank gate for each row; fp32."""
        (weight, _), a, gate = self.frozen(), self.lora_a, self.rank_gate
        b = self.lora_b if gate is None else self.lora_b * gate.unsqueeze(-2)  # (O, R) or, row by row, (B, O, R)
        with torch.autocast(weight.device.type, enabled=False):
            along = (weight @ a.to(weight.dtype).t()).float()  # (O, I) @ (I, R) -> (O, R)
            cross = (along * b).sum(dim=-1)  # ⟨W, BA⟩: (..., O, R) -> (..., O)
            update = ((b @ (a @ a.t())) * b).sum(dim=-1)  # ‖BA‖²: (..., O, R) @ (R, R) -> (..., O)
        squares = self.squares + 2 * self.scale * cross + self.scale**2 * update
        return squares.maximum(FLOOR * self.squares + ZERO_ROW).sqrt()

    def _rescaled(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """m / n, (O,) or (B, O); A (R, I); (m / n) ⊙ Bᵀ, (R, O) or (B, R, O). Cached without gradients."""

        def compute() -> tuple[Tensor, Tensor, Tensor]:
            ratio = self.magnitude / self.norms()
            return ratio, self.lora_a.to(dtype), (ratio.unsqueeze(-1) * self.lora_b).to(dtype).mT

        def contiguous() -> tuple[Tensor, Tensor, Tensor]:
            ratio, a, b = compute()
            return ratio, a, b.contiguous()

        if torch.is_grad_enabled():
            self._cache.clear()
        if torch.is_grad_enabled() or self.rank_gate is not None:
            return compute()
        return self.cached(("rescaled", dtype), contiguous)

    def terms(self, x: Tensor, dtype: torch.dtype) -> Terms | None:
        if self.rank_gate is not None or self.module_gate is not None:
            return None  # gates may give each row other factors
        return self._terms(x, dtype, self.magnitude / self.norms())

    def add_to(self, y: Tensor, x: Tensor) -> None:
        ratio, a, b = self._rescaled(y.dtype)
        y = self._scale_rows(y, ratio)
        h = self.hidden(x, a).flatten(0, -2).to(y.dtype)  # (B, T, R) -> (B * T, R)
        if b.dim() == 2:
            y.addmm_(h, b, alpha=self.effective_scale)
        else:
            rows = y.view(len(b), -1, y.shape[-1])  # (B * T, O) -> (B, T, O)
            rows.baddbmm_(h.view(len(b), -1, self.rank), b, alpha=self.effective_scale)

    def _scale_rows(self, y: Tensor, ratio: Tensor) -> Tensor:
        """Add w ⊙ (m/n − 1) ⊙ (W x) in place to ``y`` (B * T, O), which is W x + bias, and return it.

        After in-place changes through a view it returns a new view, as autograd requires.
        """
        factor, gate, bias = ratio, self.module_gate, self.frozen_bias()
        if isinstance(gate, float):
            factor = 1 + gate * (ratio - 1)
        elif gate is not None:  # (B, 1) or (B, T, 1) times (O,), or times (B, O) -> (B, O) or (B, T, O)
            change = ratio.unsqueeze(1) - 1 if gate.dim() == ratio.dim() == 2 else ratio - 1
            factor = 1 + gate.unsqueeze(-1) * change
        rows = y
        if factor.dim() > 1:
            rows = y.view(len(factor), -1, y.shape[-1])  # (B * T, O) -> (B, T, O)
            factor = factor if factor.dim() == 3 else factor.unsqueeze(1)  # (B, O) -> (B, 1, O)
        rows.mul_(factor)
        if bias is not None:
            rows.add_(bias * (1 - factor))
        return y if rows is y else rows.view(y.shape)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """ΔW = (m/n) ⊙ (W + s · B diag(g) A) − W, (O, I), fp32. Gates must not differ between rows."""
        update = super().delta()
        ratio = (self.magnitude / self.norms()).unsqueeze(-1)  # (O, 1)
        return (ratio - 1) * self.frozen()[0] + ratio * update
