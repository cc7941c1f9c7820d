"""Prompt-aware routing: per layer, choose the low-rank modules of a sequence once, from its prompt.

Source: MiLoRA (Zhang et al., Findings of EMNLP 2024, arXiv 2410.18035): router, pooler and activation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.linear import LowRank

#: a_0…a_6 and b_1…b_5 of :class:`Rational`: the least-squares fit to GeLU at 601 points of [-3, 3] (error ≤ 1.2e-4).
GELU_NUMERATOR = (2.83156e-05, 0.5, 0.398498, 0.162535, 0.0642467, 0.0183692, 0.0021049)
GELU_DENOMINATOR = (0.0, 0.325069, 0.0, 0.0367384, 0.0)


class Rational(nn.Module):
    """Learnable activation Ra(x) = Σ_{j=0..6} a_j x^j / (1 + |Σ_{i=1..5} b_i x^i|), elementwise, starting as GeLU."""

    def __init__(self) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.tensor(GELU_NUMERATOR))
        self.denominator = nn.Parameter(torch.tensor(GELU_DENOMINATOR))

    def forward(self, x: Tensor) -> Tensor:
        above = torch.zeros_like(x)
        for a in self.numerator.flip(0):
            above = above * x + a
        below = torch.zeros_like(x)
        for b in self.denominator.flip(0):
            below = (below + b) * x
        return above / (1 + below.abs())


class SelfAttentionPool(nn.Module):
    """u = H w, α = softmax of u over the prompt's tokens, h = αᵀ H: (B, T, D), mask (B, T) -> (B, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        scores = (hidden @ self.weight).masked_fill(~mask, float("-inf"))  # (B, T, D) @ (D,) -> (B, T)
        return torch.einsum("bt,btd->bd", scores.softmax(dim=-1), hidden)


class Router(nn.Module):
    """p = softmax(Ra(pool(H)) W_r): hidden states (B, T, D) and prompt mask (B, T) -> probabilities (B, N), in fp32."""

    def __init__(self, width: int, choices: int, device: torch.device | None = None):
        super().__init__()
        self.pooler = SelfAttentionPool(width)
        self.activation = Rational()
        self.projection = nn.Linear(width, choices, bias=False)
        nn.init.normal_(self.projection.weight, std=0.02)
        self.to(device)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = self.pooler(hidden.float(), mask)  # (B, T, D) -> (B, D)
            return self.projection(self.activation(pooled)).softmax(dim=-1)  # (B, D) -> (B, N)


def top_k_gates(probabilities: Tensor, k: int) -> Tensor:
    """Keep the k largest of each row, scaled to sum to k: (B, N) -> (B, N). An all-equal row of k = N gives ones."""
    kept = torch.zeros_like(probabilities).scatter(1, probabilities.topk(k).indices, 1.0) * probabilities
    return k * kept / kept.sum(dim=-1, keepdim=True)


def load_balance(probabilities: Tensor) -> Tensor:
    """N · Σ_i f_i p̂_i of one layer: f the share of prompts whose arg-max is i, p̂ the mean probability. 1 if even."""
    choices = probabilities.shape[1]
    shares = torch.bincount(probabilities.argmax(dim=-1), minlength=choices) / len(probabilities)  # (N,)
    return choices * (shares * probabilities.mean(dim=0)).sum()


class PromptRouting:
    """Routes an adapted model: hooks in front of the model and of each layer.

    A forward pass with an empty KV cache starts new sequences. Its prompt is ``prompt_mask`` (B, T), an extra keyword
    of the model's forward, or else every token that ``attention_mask`` shows. Each layer's router then sets the gates
    of its modules, once for each distinct prompt; passes that continue a KV cache reuse them, also when beams or
    candidate answers have multiplied the rows since (n copies of a row must stand together).

    ``routed`` counts router evaluations (prompts × layers); ``usage`` (L, N) counts how often a module was chosen
    while no gradient was recorded. Cost of a decoding step: none beyond the chosen modules.
    """

    def __init__(self, model: PreTrainedModel, layers: list[nn.Module], parts: list[list[LowRank]], k: int):
        self.k = k
        self.parts = parts
        self.routers: list[Router] = []
        self.enabled = True
        self.routed = 0
        self.usage = torch.zeros(len(layers), len(parts[0]), dtype=torch.long)
        self.probabilities: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._applied = False  # whether the modules hold ``_gates`` now
        self._cache: object | None = None  # the KV cache that belongs to ``_gates``; None until it is seen
        self._mask: Tensor | None = None
        self._first: Tensor | None = None
        self._copy: Tensor | None = None
        model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        for index, layer in enumerate(layers):
            device = next(layer.parameters()).device
            layer.prompt_router = Router(model.config.hidden_size, len(parts[index]), device)
            self.routers.append(layer.prompt_router)
            layer.register_forward_pre_hook(self._before_layer(index), with_kwargs=True)

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs.pop("prompt_mask", None)
        if not self.enabled:
            self._mask = None
            self._open_all()
            return args, kwargs
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0] if args else None
        rows = ids if ids is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            assert cache is self._cache or self._cache is None, "these gates belong to another KV cache"
            self._cache, self._mask = cache, None
            self._continue(rows.shape[0])
            return args, kwargs
        if mask is None:
            mask = kwargs.get("attention_mask")
        mask = torch.ones(rows.shape[:2], device=rows.device) if mask is None else mask[:, : rows.shape[1]]
        self._mask = mask.bool()
        self._first = self._copy = None
        if ids is not None and not torch.is_grad_enabled():
            self._share_between_copies(torch.where(self._mask, ids, -1))
        self.probabilities, self._gates = [], []
        self._cache, self._applied = cache, True
        return args, kwargs

    def _share_between_copies(self, prompts: Tensor) -> None:
        """Route equal neighbouring rows (beams) once: ``_first`` of each group, ``_copy`` maps rows to groups."""
        if len(prompts) > 1:
            _, copy, count = torch.unique_consecutive(prompts, dim=0, return_inverse=True, return_counts=True)
            if len(count) < len(prompts):
                self._first, self._copy = count.cumsum(0) - count, copy

    def _before_layer(self, index: int) -> Callable[[nn.Module, tuple, dict], None]:
        def route(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._mask is None:
                return
            hidden, mask = args[0] if args else kwargs["hidden_states"], self._mask
            if self._first is not None:
                hidden, mask = hidden[self._first], mask[self._first]
            probabilities = self.routers[index](hidden, mask)  # (B, T, D) -> (B, N)
            gates = top_k_gates(probabilities, self.k)
            self.routed += len(gates)
            if not torch.is_grad_enabled():
                self.usage[index] += (gates > 0).sum(dim=0).cpu()
            if self._copy is not None:
                gates = gates[self._copy]
            self.probabilities.append(probabilities)
            self._gates.append(gates)
            self._set(index, gates)

        return route

    def _set(self, index: int, gates: Tensor) -> None:
        """Hand the gates (B, N) of a layer to its modules; without gradient, unused modules are skipped."""
        used = [True] * gates.shape[1] if gates.requires_grad else (gates > 0).any(dim=0).tolist()
        for column, part in enumerate(self.parts[index]):
            part.module_gate = gates[:, column]
            part.skip = not used[column]

    def _continue(self, rows: int) -> None:
        """Reuse the gates, each row repeated where there are now more rows than prompts."""
        assert self._gates, "the KV cache was not filled through this adapter"
        copies, left = divmod(rows, len(self._gates[0]))
        assert copies and not left, f"{rows} rows continue a cache of {len(self._gates[0])} prompts"
        if copies > 1:
            self._gates = [gates.repeat_interleave(copies, dim=0) for gates in self._gates]
        if copies > 1 or not self._applied:
            for index, gates in enumerate(self._gates):
                self._set(index, gates)
            self._applied = True

    def _open_all(self) -> None:
        self._applied = False
        for layer in self.parts:
            for part in layer:
                part.module_gate, part.skip = None, False
