"""The low-rank module: s · w ⊙ B (g ⊙ (A drop(x))), added to the output of a frozen linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable
from inspect import get_annotations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_cli.adapter.fused_autograd import Terms


class LowRank(nn.Module):
    """One low-rank module: s · w ⊙ B (g ⊙ (A drop(x))).

    ``lora_a`` (R, I) starts Kaiming-uniform and ``lora_b`` (O, R) zero, so a fresh module changes nothing, exactly.
    Both are stored in fp32 and cast to the dtype of the input, so bf16 training has fp32 master weights.

    A kind is a subclass that overrides what differs: it creates further tensors in :meth:`build`, names them in
    :meth:`tensors`, and declares settings as annotated attributes, which the constructor takes by name.

    Four transient settings belong to whoever runs the model and are never saved:

    - ``rank_gate``: g, (R,) for all rows or (B, R) per row; None means ones.
    - ``module_gate``: w, (B,) per row, (B, T) per token, or a number; None means 1.
    - ``skip``: compute nothing (for a module whose gate is zero in every row).
    - ``soft``: make no hard choice that rounding could flip (plain LoRA makes none).
    """

    #: Set by the linear that this module is attached to: its current frozen weight (O, I) and bias (O,).
    frozen: Callable[[], tuple[Tensor, Tensor | None]]
    frozen_bias: Callable[[], Tensor | None]  #: the bias alone, which needs no dequantisation

    #: Why this kind cannot be merged into a single weight; empty if it can.
    unmergeable = ""

    #: The axis that counts ranks, for each of :meth:`tensors` that has one. Empty: ranks are not scored or resized.
    rank_axes = {"lora_A.weight": 0, "lora_B.weight": 1}

    #: A setting: names of :meth:`tensors` that do not train. They are still saved, pruned and loaded.
    fixed: Collection[str] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float,
        device: torch.device | None = None,
        **settings: Any,
    ):
        super().__init__()
        kinds = [kind for kind in type(self).__mro__ if issubclass(kind, LowRank)]
        known = {name for kind in kinds for name in get_annotations(kind)} - {"frozen", "frozen_bias"}
        for name, value in settings.items():
            assert name in known, f"{type(self).__name__} declares no setting '{name}'"
            setattr(self, name, value)
        self.scale = alpha / rank
        self.dropout = dropout
        self.lora_a = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.rank_gate: Tensor | None = None
        self.module_gate: Tensor | float | None = None
        self.soft = False
        self._skip = False
        self._cache: dict[Hashable, tuple[list, tuple[Tensor, ...]]] = {}
        self.build()

    def build(self) -> None:
        """Create the kind's tensors besides A and B, on their device. Called at the end of the constructor."""

    @property
    def skip(self) -> bool:
        return self._skip

    @skip.setter
    def skip(self, skip: bool) -> None:
        if skip != self._skip:
            self._skip = skip
            self.skip_changed()

    def skip_changed(self) -> None:
        """Called when ``skip`` changes; replaced by the linear that this module is attached to."""

    @property
    def effective_scale(self) -> float:
        """s, times w if that is a number."""
        return self.scale * self.module_gate if isinstance(self.module_gate, float) else self.scale

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by the names they are saved under (those of the PEFT library)."""
        return {"lora_A.weight": self.lora_a, "lora_B.weight": self.lora_b}

    def trained(self) -> dict[str, nn.Parameter]:
        """:meth:`tensors` without the ``fixed`` ones."""
        return {name: parameter for name, parameter in self.tensors().items() if name not in self.fixed}

    def constants(self) -> dict[str, Tensor]:
        """Tensors that are saved but are no parameters, by name."""
        return {}

    def peft_options(self) -> dict[str, Any] | None:
        """What this kind sets in PEFT's LoRA configuration; None if PEFT does not compute the same function."""
        return None if self.constants() or self.unmergeable else {}

    @torch.no_grad()
    def resize(self, keep: Tensor, fresh: int) -> None:
        """Keep the ranks with indices ``keep`` and append ``fresh`` ones, which change nothing; ``scale`` stays.

        A fresh row of A is Gaussian with the variance of LoRA's initial values, its column of B is zero. The
        parameters remain the same objects.
        """
        tensors = self.tensors()
        for name, axis in self.rank_axes.items():
            tensors[name].data = resized(tensors[name].data, axis, keep, fresh)
            tensors[name].grad = None
        nn.init.normal_(self.lora_a[len(keep) :], std=(3 * self.lora_a.shape[1]) ** -0.5)

    def attach(self, weight: Tensor, bias: Tensor | None) -> None:
        """Called once with the frozen weight (O, I) that this module updates, and its bias (O,), if any."""

    def match_shapes(self, shapes: dict[str, torch.Size]) -> None:
        """Called with the shapes of saved tensors before they are copied in; kinds whose rank changes adopt them."""

    def sync_weight(self, weight: Tensor, enabled: bool) -> None:
        """Called after saved tensors were copied in, and when the adapter is switched on or off.

        A kind that changes the stored ``weight`` (O, I) updates it here.
        """

    def down(self) -> Tensor:
        """A of the update, (R, I); R may exceed ``rank``."""
        return self.lora_a

    def up(self) -> Tensor:
        """B of the update, (O, R)."""
        return self.lora_b

    def cached(self, key: Hashable, compute: Callable[[], tuple[Tensor, ...]]) -> Any:
        """``compute()``, reused while none of this module's tensors changed (frozen weights are assumed constant).

        Detects new tensors, reassigned ``.data`` and version bumps. Misses writes into ``.data``, fused optimizers, and
        a second ``.data`` at the address of the first: call ``torch.autograd.graph.increment_version`` after these.
        Passes that record gradients clear the cache.
        """
        entry = self._cache.get(key)
        if entry is not None:
            for owner, name, tensor, version, address in entry[0]:
                if owner[name] is not tensor or tensor._version != version or tensor.data_ptr() != address:
                    break
            else:
                return entry[1]
        state = [
            (owner, name, tensor, tensor._version, tensor.data_ptr())
            for owner in (self._parameters, self._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self._cache[key] = state, compute()
        return self._cache[key][1]

    def cached_bytes(self) -> int:
        """Memory of the results in the cache, without those that share storage with this module's tensors."""
        shared = {tensor.untyped_storage().data_ptr() for tensor in (*self.parameters(), *self.buffers())}
        storages = [tensor.untyped_storage() for _, result in self._cache.values() for tensor in result]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in shared}.values())

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (R, I) and Bᵀ (R, O) in ``dtype``.

        Without gradients Bᵀ is contiguous: decoding reads it 2 to 3 times as fast.
        """
        if torch.is_grad_enabled():
            self._cache.clear()
            return self.down().to(dtype), self.up().to(dtype).t()
        return self.cached(dtype, lambda: (self.down().to(dtype), self.up().to(dtype).t().contiguous()))

    def gate(self, x: Tensor) -> Tensor | None:
        """The factor w ⊙ g of A drop(x), broadcasting to (B, T, R); None if it is 1.

        A w that is a number is part of :attr:`effective_scale` instead.
        """
        ranks, gate = self.rank_gate, self.module_gate
        if ranks is not None and ranks.dim() == 2:
            ranks = _over_tokens(ranks, x)
        if not isinstance(gate, Tensor):
            return ranks
        gate = _over_tokens(gate.unsqueeze(-1), x) if gate.dim() == 1 else gate.reshape(*x.shape[:-1], 1)
        return gate if ranks is None else ranks * gate

    def hidden(self, x: Tensor, a: Tensor) -> Tensor:
        """w ⊙ g ⊙ (A drop(x)), with A from :meth:`operands`: (B, T, I) -> (B, T, R)."""
        gate = self.gate(x)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        h = F.linear(x, a)  # (B, T, I) @ (I, R) -> (B, T, R)
        return h if gate is None else h * gate.to(h.dtype)

    def terms(self, x: Tensor, dtype: torch.dtype) -> Terms | None:
        """The update for ``x`` (B, T, I) in ``dtype``, as input of :mod:`lowrank_cli.adapter.fused_autograd`.

        None if only :meth:`add_to` computes it, as for a kind that overrides it.
        """
        if type(self).add_to is not LowRank.add_to or type(self).hidden is not LowRank.hidden:
            return None
        return self._terms(x, dtype, None)

    def _terms(self, x: Tensor, dtype: torch.dtype, row_scale: Tensor | None) -> Terms:
        gate = self.gate(x)
        self._cache.clear()
        return Terms(
            self.down().to(dtype),
            self.up().to(dtype),
            None if gate is None else gate.to(dtype),
            None if row_scale is None else row_scale.to(dtype),
            self.effective_scale,
            self.dropout if self.training else 0.0,
        )

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add the update for ``x`` (B, T, I) to the frozen output ``y`` (B * T, O), in place."""
        a, b = self.operands(y.dtype)
        h = self.hidden(x, a).flatten(0, -2).to(y.dtype)  # (B, T, R) -> (B * T, R)
        y.addmm_(h, b, alpha=self.effective_scale)  # += (B * T, R) @ (R, O)

    def gated_b(self) -> Tensor:
        """B diag(g), (O, R). Gates must not differ between rows."""
        assert self.module_gate is None and (self.rank_gate is None or self.rank_gate.dim() == 1)
        return self.up() if self.rank_gate is None else self.up() * self.rank_gate

    def delta(self) -> Tensor:
        """ΔW = s · B diag(g) A, (O, I), fp32."""
        return self.scale * (self.gated_b().float() @ self.down().float())

    @torch.no_grad()
    def delta_factors(self) -> tuple[Tensor, Tensor]:
        """b (O, R) and a (R, I), fp32, whose product is the whole change of the pretrained weight."""
        return self.scale * self.gated_b().float(), self.down().float()


def resized(tensor: Tensor, axis: int, keep: Tensor, fresh: int) -> Tensor:
    """The slices ``keep`` of ``tensor`` along ``axis``, followed by ``fresh`` slices of zeros."""
    kept = tensor.index_select(axis, keep.to(tensor.device))
    shape = list(kept.shape)
    shape[axis] = fresh
    return torch.cat([kept, kept.new_zeros(shape)], dim=axis)


def _over_tokens(gate: Tensor, x: Tensor) -> Tensor:
    """Shape a gate (B, X) for an input (B, T, I), or (B * T, I) in models that flatten their tokens (OPT)."""
    if x.dim() == 3:
        return gate.unsqueeze(1)  # (B, X) -> (B, 1, X)
    return gate.repeat_interleave(x.shape[0] // gate.shape[0], dim=0)  # (B, X) -> (B * T, X)
