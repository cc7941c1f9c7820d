"""Mixture of low-rank experts: a linear's ranks in equal groups, of which a router picks a few for each token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_cli.adapter.low_rank import LowRank


class Experts(LowRank):
    """E experts of rank R / E in one module: s · Σ_e g_e B_e A_e drop(x), with s = k · alpha / R.

    With ``router`` W_r (E, I), g is the softmax over the k largest of W_r x for each token, and 0 for other experts.
    Equal logits with k = E give g = 1 / E, which is exactly LoRA of rank R. Experts are consecutive groups of rows of
    ``lora_a`` and columns of ``lora_b``. All are computed, and gated between the two products: for ranks this small
    that is faster than gathering k of them for each token.

    In training, ``probabilities`` (n, E) holds the softmax over all experts in the last forward pass, for the n tokens
    in the mask ``counted`` (B * T,), or all if it is None (see :func:`ignore_padding`).
    """

    unmergeable = "the experts are chosen token by token"
    rank_axes = {}  # the ranks of an expert come and go together

    experts: int  #: E; a divisor of the rank
    k: int  #: experts that a token activates

    def build(self) -> None:
        assert self.rank % self.experts == 0, "an expert has a whole number of ranks"
        self.scale *= self.k
        self.router = nn.Parameter(self.lora_a.new_empty(self.experts, self.lora_a.shape[1]))
        nn.init.normal_(self.router, std=0.02)
        self.probabilities: Tensor | None = None
        self.counted: Tensor | None = None

    def tensors(self) -> dict[str, nn.Parameter]:
        return super().tensors() | {"expert_router.weight": self.router}

    def gates(self, x: Tensor) -> Tensor:
        """g of every token, in fp32: (B, T, I) -> (B, T, E)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.router)  # (B, T, I) @ (I, E) -> (B, T, E)
        self.probabilities = None
        if self.training:
            probabilities = logits.softmax(dim=-1).flatten(0, -2)  # (B, T, E) -> (B * T, E)
            whole = self.counted is None or len(self.counted) != len(probabilities)  # a linear after a pooler
            self.probabilities = probabilities if whole else probabilities[self.counted]  # (B * T, E) -> (n, E)
        if self.soft:
            return logits.softmax(dim=-1)
        kept = logits.topk(self.k)
        return torch.zeros_like(logits).scatter(-1, kept.indices, kept.values.softmax(dim=-1))

    def gate(self, x: Tensor) -> Tensor:
        gate, experts = super().gate(x), self.gates(x).repeat_interleave(self.rank // self.experts, dim=-1)
        return experts if gate is None else experts * gate  # (B, T, R)


def ignore_padding(model: nn.Module, modules: Iterable[Experts]) -> None:
    """Exclude padding, by the ``attention_mask`` (B, T) of training passes of ``model``, from ``probabilities``."""
    experts = list(modules)

    def set_counted(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        counted = mask.bool().flatten() if model.training and mask is not None else None  # (B, T) -> (B * T,)
        for module in experts:
            module.counted = counted

    model.register_forward_pre_hook(set_counted, with_kwargs=True)
