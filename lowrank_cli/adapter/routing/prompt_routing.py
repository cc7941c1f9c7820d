"""Prompt-aware routing: each layer chooses the low-rank modules of a sequence once, from its prompt.

Source: Zhang et al., Findings of EMNLP 2024, arXiv 2410.18035. The routers are in ``router.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lowrank_cli.adapter.kv_cache import continued_cache, returned_cache
from lowrank_cli.adapter.low_rank import LowRank
from lowrank_cli.adapter.routing.choice_stats import Choices
from lowrank_cli.adapter.routing.router import Router, scaled_gates
from lowrank_cli.adapter.training.packing import BOUNDS


def prompts(args: tuple, kwargs: dict, mask: Tensor | None) -> Tensor:
    """Mask (B, T) of the prompts of new sequences: ``mask``, or else all tokens in ``attention_mask``."""
    rows = _inputs(args, kwargs)[1]
    mask = kwargs.get("attention_mask") if mask is None else mask
    mask = torch.ones(rows.shape[:2], device=rows.device) if mask is None else mask[:, : rows.shape[1]]
    return mask.bool()


def batch_shape(args: tuple, kwargs: dict) -> tuple[int, int]:
    """(B, T) of a forward pass."""
    rows, tokens = _inputs(args, kwargs)[1].shape[:2]
    return rows, tokens


def _inputs(args: tuple, kwargs: dict) -> tuple[Tensor | None, Tensor]:
    """Token ids (B, T), if given, and the model's input: the ids or embeddings (B, T, D)."""
    ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0] if args else None
    return ids, kwargs["inputs_embeds"] if ids is None else ids


@dataclass(frozen=True)
class Packed:
    """The prompts of B examples that are packed in one row of T tokens; P is the length of the longest."""

    positions: Tensor  #: (B, P), of the tokens of each example's prompt in the row, padded
    mask: Tensor  #: (B, P), False for padding
    examples: Tensor  #: (1, T), the example of each token

    @classmethod
    def of(cls, bounds: Tensor, prompts: Tensor) -> Packed:
        """``bounds`` (B + 1,): where examples begin and end; ``prompts`` (1, T): mask of the prompts' tokens."""
        lengths = bounds.diff()
        examples = torch.arange(len(lengths), device=bounds.device).repeat_interleave(lengths)  # (T,)
        rows = [(prompts[0] & (examples == row)).nonzero()[:, 0] for row in range(len(lengths))]
        positions = pad_sequence(rows, batch_first=True, padding_value=-1)  # (B, P)
        return cls(positions.clamp_min(0), positions >= 0, examples.unsqueeze(0))


class PromptRouting:
    """Routes an adapted model with forward pre-hooks on the model and on each layer.

    A forward pass with an empty KV cache starts new sequences. Their prompts are ``prompt_mask`` (B, T), an extra
    keyword of the model's forward, or else all tokens in ``attention_mask``. Each layer's router sets the gates of its
    modules once for each distinct prompt. Passes that continue a KV cache reuse them, also after beams or candidate
    answers have multiplied the rows (copies of a row must be adjacent). A prompt must fit in one pass: if it is
    prefilled in chunks, the first chunk decides for all.

    In a packed row (:mod:`lowrank_cli.adapter.training.packing`) each example has its own prompt, and the gates of that
    prompt apply to the example's tokens.

    A decoding step computes every module that any row uses, for all rows. Gathering the rows that use a module would
    make its products 1.3 to 1.5 times as slow in a decoding step, and a prefill about 1 % faster (4 of 8 rows, CPU).

    Args:
        layers: the model's layers.
        modules: for each layer, the N modules that its router chooses from.
        routers: one for each layer.
        k: modules of a layer that a prompt uses.
        gates: turns probabilities (B, N) and k into gates (B, N): one of
            :data:`~lowrank_cli.adapter.routing.router.GATES`.

    Attributes:
        soft: use every module, weighted by its probability.
        warming: the same, only in passes that record gradients.
        routed: number of router evaluations (prompts × layers), without soft passes.
        choices: statistics of passes without gradients that are not soft.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[nn.Module],
        modules: list[list[LowRank]],
        routers: list[Router],
        k: int,
        gates: Callable[[Tensor, int], Tensor] = scaled_gates,
    ):
        self.k = k
        self.modules = modules
        self.routers = routers
        self.choose = gates
        self.soft = self.warming = False
        self.enabled = True
        self.routed = 0
        self.choices = Choices(len(layers), len(modules[0]), k)
        self._pooled: list[list[Tensor]] | None = None
        self.probabilities: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._applied = False  # whether the modules currently hold ``_gates``
        self._cache: weakref.ref[Any] | None = None  # the KV cache that ``_gates`` belong to
        self._mask: Tensor | None = None
        self._packed: Packed | None = None
        self._first: Tensor | None = None
        self._copy: Tensor | None = None
        model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        model.register_forward_hook(self._after_model)
        for index, (layer, router) in enumerate(zip(layers, routers, strict=True)):
            layer.prompt_router = router.to(next(layer.parameters()).device)
            layer.register_forward_pre_hook(self._before_layer(index), with_kwargs=True)

    @contextmanager
    def pooling(self) -> Iterator[list[list[Tensor]]]:
        """Yields, for each layer, the pooled prompts (B, D) of every pass inside."""
        self._pooled = [[] for _ in self.routers]
        try:
            yield self._pooled
        finally:
            self._pooled = None

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs.pop("prompt_mask", None)
        if not self.enabled:
            self._mask = None
            self.open_all()
            return args, kwargs
        ids, rows = _inputs(args, kwargs)
        cache = continued_cache(args, kwargs, rows.shape[1])
        if cache is not None:
            assert self._cache is not None and cache is self._cache(), "these gates belong to another KV cache"
            self._mask = None
            self._continue(rows.shape[0])
            return args, kwargs
        self._mask = prompts(args, kwargs, mask)
        self._packed = Packed.of(kwargs[BOUNDS], self._mask) if kwargs.get(BOUNDS) is not None else None
        self._first = self._copy = None
        if ids is not None and not torch.is_grad_enabled():
            self._share_between_copies(torch.where(self._mask, ids, -1))
        self.probabilities, self._gates = [], []
        self._cache, self._applied = None, True
        return args, kwargs

    def _after_model(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Remember the KV cache of these prompts, without keeping it alive."""
        cache = returned_cache(output)
        if self._mask is not None and cache is not None:
            self._cache = weakref.ref(cache)

    def _share_between_copies(self, prompts: Tensor) -> None:
        """Route equal adjacent rows (beams) once: ``_first`` row of each group; ``_copy`` maps rows to groups."""
        if len(prompts) > 1:
            _, copy, count = torch.unique_consecutive(prompts, dim=0, return_inverse=True, return_counts=True)
            if len(count) < len(prompts):
                self._first, self._copy = count.cumsum(0) - count, copy

    def _before_layer(self, index: int) -> Callable[[nn.Module, tuple, dict], None]:
        def route(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._mask is None:
                return
            hidden, mask = args[0] if args else kwargs["hidden_states"], self._mask
            if self._packed is not None:
                hidden, mask = hidden[0, self._packed.positions], self._packed.mask  # (1, T, D) -> (B, P, D)
            if self._first is not None:
                hidden, mask = hidden[self._first], mask[self._first]
            pooled = self.routers[index].pool(hidden, mask)  # (B, T, D) -> (B, D)
            if self._pooled is not None:
                self._pooled[index].append(pooled)
            probabilities = self.routers[index].choose(pooled)  # (B, D) -> (B, N)
            gates = self._choose(probabilities)
            if not self.soft:
                self.routed += len(gates)
                if not torch.is_grad_enabled():
                    self.choices.add(index, probabilities)
            if self._copy is not None:
                gates = gates[self._copy]
            self.probabilities.append(probabilities)
            self._gates.append(gates)
            self._set(index, gates if self._packed is None else gates[self._packed.examples])

        return route

    def _choose(self, probabilities: Tensor) -> Tensor:
        if self.soft or (self.warming and torch.is_grad_enabled()):
            return scaled_gates(probabilities, probabilities.shape[1])
        return self.choose(probabilities, self.k)

    def _set(self, index: int, gates: Tensor) -> None:
        """Set the gates (B, N) of a layer's modules, or (1, T, N) of each token of a packed row.

        Without gradients, unused modules are skipped and a gate shared by all rows becomes a number.
        """
        if gates.requires_grad:
            for column, module in enumerate(self.modules[index]):
                module.module_gate, module.skip = gates[..., column], False
            return
        low, high = torch.stack(gates.flatten(0, -2).aminmax(dim=0)).tolist()  # (B, N) -> (2, N)
        for column, module in enumerate(self.modules[index]):
            module.module_gate = gates[..., column] if low[column] < high[column] else high[column]
            module.skip = high[column] == 0

    def _continue(self, rows: int) -> None:
        """Reuse the gates, repeated if there are now several rows for each prompt."""
        assert self._gates, "the KV cache was not filled through this adapter"
        copies, left = divmod(rows, len(self._gates[0]))
        assert copies and not left, f"{rows} rows continue a cache of {len(self._gates[0])} prompts"
        if copies > 1:
            self._gates = [gates.repeat_interleave(copies, dim=0) for gates in self._gates]
        if copies > 1 or not self._applied:
            for index, gates in enumerate(self._gates):
                self._set(index, gates)
            self._applied = True

    def open_all(self) -> None:
        """Switch every module on for all rows, until the next forward pass."""
        self._applied = False
        for layer in self.modules:
            for module in layer:
                module.module_gate, module.skip = None, False
