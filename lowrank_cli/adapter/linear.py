"""The equation: a frozen linear plus gated low-rank updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable
from functools import partial
from inspect import get_annotations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lowrank_cli.adapter.fused_autograd import Frozen, Remake, Terms, remake_of
from lowrank_cli.adapter.quantized import dense, quantized
from lowrank_cli.adapter.shared_input import Siblings
from lowrank_cli.adapter.spans import Span, index, is_view, put, take

LINEARS = (nn.Linear, Conv1D)


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(in, out) features of an ``nn.Linear`` or of GPT-2's ``Conv1D``, whose weight is transposed."""
    if isinstance(linear, Conv1D):
        return int(linear.weight.shape[0]), int(linear.weight.shape[1])
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def bare(module: nn.Module) -> nn.Module:
    """The linear inside ``module``, which wraps one to add updates, or ``module`` itself."""
    base = getattr(module, "base", None)
    return base if isinstance(base, nn.Module) else module


class LowRank(nn.Module):
    """One low-rank module: s · w ⊙ B (g ⊙ (A drop(x))).

    ``lora_a`` (R, I) is Kaiming-uniform, ``lora_b`` (O, R) zero, so a fresh module changes nothing, exactly.
    Both are kept in fp32 and computed in the dtype of the input, so that training in bf16 has fp32 masters.

    A kind is a subclass that says what differs. It makes tensors of its own in :meth:`build`, names them in
    :meth:`tensors`, and declares settings of its own as annotated attributes, which the constructor takes by name.

    Four transient settings belong to whoever runs the model, not to the adapter, and are never saved:

    - ``rank_gate``: g, (R,) for all rows or (B, R) row by row; None is all ones.
    - ``module_gate``: w, (B,) row by row or (B, T) token by token, or one number for all; None is all ones.
    - ``skip``: compute nothing (for a module whose gate is zero in every row).
    - ``soft``: make no hard choice that rounding could turn over (LoRA makes none).
    """

    #: Set by the linear that this module is added to: gives its frozen weight (O, I) and bias (O,), where they are now.
    frozen: Callable[[], tuple[Tensor, Tensor | None]]
    frozen_bias: Callable[[], Tensor | None]  #: the bias alone, which costs nothing where the weight is quantised

    #: Why no single weight equals this kind of module, where none does.
    unmergeable = ""

    #: The axis that counts ranks, for each of :meth:`tensors` that has one; none: they are not scored or changed.
    rank_axes = {"lora_A.weight": 0, "lora_B.weight": 1}

    #: A setting: names of :meth:`tensors` that keep their first values. They are saved, pruned and loaded all the same.
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
        self._results: dict[Hashable, tuple[list, tuple[Tensor, ...]]] = {}
        self.build()

    def build(self) -> None:
        """Make the tensors that this kind has besides A and B, on their device. Called once, when the rest is there."""

    @property
    def skip(self) -> bool:
        return self._skip

    @skip.setter
    def skip(self, skip: bool) -> None:
        if skip != self._skip:
            self._skip = skip
            self.switched()

    def switched(self) -> None:
        """Called when ``skip`` has changed; the linear that this module is added to puts its own function here."""

    @property
    def strength(self) -> float:
        """s, times w where that is one number."""
        return self.scale * self.module_gate if isinstance(self.module_gate, float) else self.scale

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by the names under which they are saved (those of the PEFT library)."""
        return {"lora_A.weight": self.lora_a, "lora_B.weight": self.lora_b}

    def trained(self) -> dict[str, nn.Parameter]:
        """Those of :meth:`tensors` that train: all but the ``fixed`` ones."""
        return {name: parameter for name, parameter in self.tensors().items() if name not in self.fixed}

    def constants(self) -> dict[str, Tensor]:
        """What is no parameter and must be saved all the same, by name."""
        return {}

    def peft_options(self) -> dict[str, Any] | None:
        """What this kind sets in PEFT's LoRA configuration; None where PEFT does not compute the same function."""
        return None if self.constants() or self.unmergeable else {}

    @torch.no_grad()
    def resize(self, keep: Tensor, fresh: int) -> None:
        """Keep the ranks ``keep`` (their indices) and append ``fresh`` ones, which change nothing; ``scale`` stays.

        A fresh row of A is Gaussian with the variance of LoRA's initial values, its column of B is zero. The
        parameters remain the same objects.
        """
        tensors = self.tensors()
        for name, axis in self.rank_axes.items():
            tensors[name].data = resized(tensors[name].data, axis, keep, fresh)
            tensors[name].grad = None
        nn.init.normal_(self.lora_a[len(keep) :], std=(3 * self.lora_a.shape[1]) ** -0.5)

    def attach(self, weight: Tensor, bias: Tensor | None) -> None:
        """Called once with the frozen weight (O, I) that this module updates, and its bias (O,), where it has one."""

    def fit(self, shapes: dict[str, torch.Size]) -> None:
        """Called before saved tensors are assigned, with their shapes: a kind whose rank changes takes theirs."""

    def settle(self, weight: Tensor, enabled: bool) -> None:
        """Called when saved tensors were assigned, and when the adapter is switched on or off.

        A kind that changes the stored ``weight`` (O, I) makes it what it has to be.
        """

    def down(self) -> Tensor:
        """A of the update, (R, I); R may exceed ``rank``."""
        return self.lora_a

    def up(self) -> Tensor:
        """B of the update, (O, R)."""
        return self.lora_b

    def kept(self, key: Hashable, compute: Callable[[], tuple[Tensor, ...]]) -> Any:
        """``compute()``, from an earlier call while none of this module's tensors changed (frozen ones do not).

        Seen are new tensors, ``.data`` at a new address and whatever raises a tensor's version. Not seen is what is
        written into ``.data`` or by a fused optimizer, nor a second new ``.data`` where the first was: raise the
        version then (``torch.autograd.graph.increment_version``). A pass that records gradients forgets all.
        """
        found = self._results.get(key)
        if found is not None:
            for owner, name, tensor, version, address in found[0]:
                if owner[name] is not tensor or tensor._version != version or tensor.data_ptr() != address:
                    break
            else:
                return found[1]
        state = [
            (owner, name, tensor, tensor._version, tensor.data_ptr())
            for owner in (self._parameters, self._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self._results[key] = state, compute()
        return self._results[key][1]

    def kept_bytes(self) -> int:
        """Memory of what :meth:`kept` holds beside this module's own tensors."""
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.parameters(), *self.buffers())}
        made = [tensor.untyped_storage() for _, result in self._results.values() for tensor in result]
        return sum({storage.data_ptr(): storage.nbytes() for storage in made if storage.data_ptr() not in own}.values())

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (R, I) and Bᵀ (R, O) in the dtype to compute in.

        Where no gradient is recorded Bᵀ lies row by row: a decoding step reads it 2–3 times as fast.
        """
        if torch.is_grad_enabled():
            self._results.clear()
            return self.down().to(dtype), self.up().to(dtype).t()
        return self.kept(dtype, lambda: (self.down().to(dtype), self.up().to(dtype).t().contiguous()))

    def gate(self, x: Tensor) -> Tensor | None:
        """What A drop(x) is multiplied with, which is w ⊙ g: it broadcasts to (B, T, R). None where that is 1.

        A w that is one number is not in it but in :attr:`strength`.
        """
        ranks, gate = self.rank_gate, self.module_gate
        if ranks is not None and ranks.dim() == 2:
            ranks = _over_tokens(ranks, x)
        if not isinstance(gate, Tensor):
            return ranks
        gate = _over_tokens(gate.unsqueeze(-1), x) if gate.dim() == 1 else gate.reshape(*x.shape[:-1], 1)
        return gate if ranks is None else ranks * gate

    def hidden(self, x: Tensor, a: Tensor) -> Tensor:
        """w ⊙ g ⊙ (A drop(x)), with A as :meth:`operands` gives it: (B, T, I) -> (B, T, R)."""
        gate = self.gate(x)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        h = F.linear(x, a)  # (B, T, I) @ (I, R) -> (B, T, R)
        return h if gate is None else h * gate.to(h.dtype)

    def terms(self, x: Tensor, dtype: torch.dtype) -> Terms | None:
        """The update for ``x`` (B, T, I), computed in ``dtype``, as :mod:`lowrank_cli.adapter.fused_autograd` wants it.

        None where only :meth:`add_to` computes it, as for a kind that has its own.
        """
        if type(self).add_to is not LowRank.add_to or type(self).hidden is not LowRank.hidden:
            return None
        return self._terms(x, dtype, None)

    def _terms(self, x: Tensor, dtype: torch.dtype, stretch: Tensor | None) -> Terms:
        gate = self.gate(x)
        self._results.clear()
        return Terms(
            self.down().to(dtype),
            self.up().to(dtype),
            None if gate is None else gate.to(dtype),
            None if stretch is None else stretch.to(dtype),
            self.strength,
            self.dropout if self.training else 0.0,
        )

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """``y`` (B * T, O), the frozen output, += the update for ``x`` (B, T, I), in place, in one matrix product."""
        a, b = self.operands(y.dtype)
        h = self.hidden(x, a).flatten(0, -2).to(y.dtype)  # (B, T, R) -> (B * T, R)
        y.addmm_(h, b, alpha=self.strength)  # += (B * T, R) @ (R, O)

    def columns(self) -> Tensor:
        """B diag(g), (O, R). Refused while a gate differs from row to row."""
        assert self.module_gate is None and (self.rank_gate is None or self.rank_gate.dim() == 1)
        return self.up() if self.rank_gate is None else self.up() * self.rank_gate

    def delta(self) -> Tensor:
        """ΔW = s · B diag(g) A, (O, I), fp32."""
        return self.scale * (self.columns().float() @ self.down().float())

    @torch.no_grad()
    def change(self) -> tuple[Tensor, Tensor]:
        """b (O, R), a (R, I), fp32, whose product is the whole change of the pretrained weight."""
        return self.scale * self.columns().float(), self.down().float()


def resized(tensor: Tensor, axis: int, keep: Tensor, fresh: int) -> Tensor:
    """The slices ``keep`` of ``tensor`` along ``axis``, and ``fresh`` slices of zeros behind them."""
    kept = tensor.index_select(axis, keep.to(tensor.device))
    shape = list(kept.shape)
    shape[axis] = fresh
    return torch.cat([kept, kept.new_zeros(shape)], dim=axis)


def _over_tokens(gate: Tensor, x: Tensor) -> Tensor:
    """A gate (B, X) shaped for an input (B, T, I), or (B * T, I) where a model flattens its tokens (OPT)."""
    if x.dim() == 3:
        return gate.unsqueeze(1)  # (B, X) -> (B, 1, X)
    return gate.repeat_interleave(x.shape[0] // gate.shape[0], dim=0)  # (B, X) -> (B * T, X)


#: A low-rank module and the span of the output that it covers; None is all of it.
Update = tuple[LowRank, Span | None]


class AdaptedLinear(nn.Module):
    """A frozen linear with the low-rank modules that update it.

    Usually one module covers the whole output; where a linear packs several roles (GPT-2's ``c_attn``), each module
    covers a span of the output features.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.parts = nn.ModuleDict()  # of LowRank
        self._updates: dict[str, Update] = {}
        self._active: list[Update] = []  # those to compute: not skipped, not merged, not switched off
        self.enabled = True
        self._unmerged: Tensor | None = None
        self.siblings = Siblings(self)

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models read it for its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def updates(self) -> Collection[Update]:
        """Each low-rank module with the span of the output that it covers."""
        return self._updates.values()

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def add(self, name: str, part: LowRank, span: Span | None) -> None:
        """Attach ``part`` to the whole output or to a span of it."""
        self.parts[name] = part
        self._updates[name] = (part, span)
        part.frozen, part.frozen_bias = partial(self.frozen, span), partial(self.frozen_bias, span)
        part.switched = self._choose  # type: ignore[method-assign]
        part.attach(*part.frozen())
        self._choose()

    def remove(self, name: str) -> None:
        """Take the part ``name`` off again."""
        assert not self.merged
        del self.parts[name], self._updates[name]
        self._choose()

    def rows(self, span: Span | None, weight: Tensor | None = None) -> Tensor:
        """The base's weight, or a tensor laid out like it, as (O, I), or the rows that a span covers.

        A view, except of a quantised weight and of a span that is not one run: those are copies, and writing into them
        has no effect.
        """
        weight = dense(self.weight) if weight is None else weight
        weight = weight.t() if isinstance(self.base, Conv1D) else weight
        return weight if span is None else weight[index(span, len(weight), weight.device)]

    def frozen(self, span: Span | None) -> tuple[Tensor, Tensor | None]:
        """The base's weight (O, I) and bias (O,), or the rows of them that a span covers, as :meth:`rows`."""
        return self.rows(span), self.frozen_bias(span)

    def frozen_bias(self, span: Span | None) -> Tensor | None:
        """The base's bias (O,), or the part of it that a span covers."""
        bias: Tensor | None = getattr(self.base, "bias", None)
        return bias if bias is None else take(bias, span)

    def enable(self, enabled: bool) -> None:
        """Switch all updates on or off."""
        if enabled != self.enabled:
            self.enabled = enabled
            self._choose()
            if not self.merged:
                self.settle()

    def settle(self) -> None:
        """Let each part make the stored weight what it has to be."""
        for part, span in self.updates:
            if type(part).settle is not LowRank.settle:
                rows = self.rows(span)
                part.settle(rows, self.enabled)
                self._write(span, rows)

    @torch.no_grad()
    def _write(self, span: Span | None, rows: Tensor) -> None:
        """Put ``rows`` (O, I), changed in place, into the base's weight, where they are a copy of a part of it."""
        if not is_view(span) and not quantized(self.weight):
            weight = self.rows(None)
            weight[index(span, len(weight), weight.device)] = rows.to(weight.dtype)

    def _choose(self) -> None:
        on = self.enabled and not self.merged
        self._active = [update for update in self.updates if not update[0].skip] if on else []

    def forward(self, x: Tensor, remake: Remake | None = None) -> Tensor:
        """y (B, T, O); with ``remake``, which computes ``x`` (B, T, I) again, or where ``x`` says so, it is not saved.

        A compiler sees the plain equation: it decides itself what to join and what to save.
        """
        if not self._active:
            return self.base(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            fused = self.siblings.output(self, x, remake or remake_of(x))
            if fused is not None:
                return fused
        # With gradients flat, so that in place is cheap to undo; packed linears know a common input by its identity.
        y = self.base(x.reshape(-1, x.shape[-1]) if torch.is_grad_enabled() else x)
        y = y.flatten(0, -2)  # (B, T, O) -> (B * T, O)
        for part, span in self._active:
            own = take(y, span)
            part.add_to(own, x)
            put(y, span, own)
        return y.view(*x.shape[:-1], -1)

    def fusible(self, x: Tensor) -> Frozen | None:
        """What :mod:`lowrank_cli.adapter.fused_autograd` computes for ``x``, where it can."""
        if not self._active or quantized(self.weight) or self.weight.requires_grad:
            return None  # nothing to fuse; W only through its own linear; a weight whose own gradient is asked for
        if not all(is_view(span) for _, span in self._active):
            return None  # updates are added to views of y
        bias = getattr(self.base, "bias", None)
        if bias is not None and bias.requires_grad:
            return None
        device, weight = x.device.type, self.rows(None)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if weight.dtype not in (dtype, x.dtype):
            return None
        updates = [(part.terms(x, dtype), span) for part, span in self._active]
        known = [(terms, span) for terms, span in updates if terms is not None]
        if len(known) < len(updates):
            return None
        return Frozen(weight.to(dtype), bias if bias is None else bias.to(dtype), known)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold every update into the base weight; merging twice is merging once. A copy stays on the CPU."""
        if self.merged:
            return
        self._unmerged = self.weight.detach().to("cpu", copy=True)
        for part, span in self.updates:
            rows = self.rows(span)
            rows.copy_(rows.float() + part.delta())
            self._write(span, rows)
        self._choose()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if self._unmerged is not None:
            self.weight.copy_(self._unmerged)
            self._unmerged = None
            self._choose()
