"""A frozen linear with the low-rank modules that update it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_cli.adapter.fused_autograd import FrozenLinear, Recompute, recompute_of
from lowrank_cli.adapter.low_rank import LowRank
from lowrank_cli.adapter.quantized import dense, quantized
from lowrank_cli.adapter.shared_input import InputGroup
from lowrank_cli.adapter.spans import Span, index, is_view, put, take

LINEARS = (nn.Linear, Conv1D)


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(in, out) features of an ``nn.Linear`` or of GPT-2's ``Conv1D``, whose weight is transposed."""
    if isinstance(linear, Conv1D):
        return int(linear.weight.shape[0]), int(linear.weight.shape[1])
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def unwrapped(module: nn.Module) -> nn.Module:
    """The frozen linear inside ``module``, or ``module`` itself if it wraps none."""
    base = getattr(module, "base", None)
    return base if isinstance(base, nn.Module) else module


#: A low-rank module and the span of the output that it covers (None: all of it).
Update = tuple[LowRank, Span | None]


class AdaptedLinear(nn.Module):
    """A frozen linear with the low-rank modules that update it.

    Usually one module covers the whole output. In a packed linear (GPT-2's ``c_attn``) each module covers the span of
    output features of one role.
    """

    #: Makes the base's weight whole inside, where processes divide it; see :func:`lowrank_cli.adapter.sharded.whole`.
    whole: Callable[[], AbstractContextManager] = nullcontext

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.low_rank = nn.ModuleDict()  # the LowRank modules
        self._updates: dict[str, Update] = {}
        self._active: list[Update] = []  # updates to compute: enabled, not skipped, not merged
        self.enabled = True
        self._unmerged: Tensor | None = None
        self.input_group = InputGroup(self)

    @property
    def weight(self) -> Tensor:
        """The base's weight; some models read its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def updates(self) -> Collection[Update]:
        """The low-rank modules, each with the span of the output that it covers."""
        return self._updates.values()

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def add(self, name: str, module: LowRank, span: Span | None) -> None:
        """Attach ``module`` to a span of the output, or to all of it."""
        self.low_rank[name] = module
        self._updates[name] = (module, span)
        module.frozen, module.frozen_bias = partial(self.frozen, span), partial(self.frozen_bias, span)
        module.skip_changed = self._select_active  # type: ignore[method-assign]
        with self.whole():
            module.attach(*module.frozen())
        self._select_active()

    def remove(self, name: str) -> None:
        """Detach the module ``name``."""
        assert not self.merged
        del self.low_rank[name], self._updates[name]
        self._select_active()

    def rows(self, span: Span | None, weight: Tensor | None = None) -> Tensor:
        """The rows of ``span`` (None: all) of the base's weight, or of a tensor with its layout, as (O, I).

        A view, except for a quantised weight or a periodic span: these give a copy.
        """
        weight = dense(self.weight) if weight is None else weight
        weight = weight.t() if isinstance(self.base, Conv1D) else weight
        return weight if span is None else weight[index(span, len(weight), weight.device)]

    def frozen(self, span: Span | None) -> tuple[Tensor, Tensor | None]:
        """The rows of ``span`` of the base's weight (O, I) and bias (O,), as :meth:`rows`."""
        return self.rows(span), self.frozen_bias(span)

    def frozen_bias(self, span: Span | None) -> Tensor | None:
        """The features of ``span`` of the base's bias (O,)."""
        bias: Tensor | None = getattr(self.base, "bias", None)
        return bias if bias is None else take(bias, span)

    def enable(self, enabled: bool) -> None:
        """Switch all updates on or off."""
        if enabled != self.enabled:
            self.enabled = enabled
            self._select_active()
            if not self.merged:
                self.sync_weight()

    def sync_weight(self) -> None:
        """Let modules that change the stored weight update it."""
        for module, span in self.updates:
            if type(module).sync_weight is not LowRank.sync_weight:
                with self.whole():
                    rows = self.rows(span)
                    module.sync_weight(rows, self.enabled)
                    self._write(span, rows)

    @torch.no_grad()
    def _write(self, span: Span | None, rows: Tensor) -> None:
        """Write ``rows`` (O, I), changed in place, back into the base's weight if :meth:`rows` copied them."""
        if not is_view(span) and not quantized(self.weight):
            weight = self.rows(None)
            weight[index(span, len(weight), weight.device)] = rows.to(weight.dtype)

    def _select_active(self) -> None:
        on = self.enabled and not self.merged
        self._active = [update for update in self.updates if not update[0].skip] if on else []

    def forward(self, x: Tensor, recompute: Recompute | None = None) -> Tensor:
        """``x`` (B, T, I) -> y (B, T, O). The backward pass uses ``recompute``, if known, instead of a saved ``x``.

        ``torch.compile`` sees the plain equation and decides itself what to fuse and save.
        """
        if not self._active:
            return self.base(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            fused = self.input_group.output(self, x, recompute or recompute_of(x))
            if fused is not None:
                return fused
        # Flat under autograd: in-place updates of a view are costly. Else as it is: packed linears compare identities.
        y = self.base(x.reshape(-1, x.shape[-1]) if torch.is_grad_enabled() else x)
        y = y.flatten(0, -2)  # (B, T, O) -> (B * T, O)
        for module, span in self._active:
            outputs = take(y, span)
            module.add_to(outputs, x)
            put(y, span, outputs)
        return y.view(*x.shape[:-1], -1)  # (B * T, O) -> (B, T, O)

    def fusible(self, x: Tensor) -> FrozenLinear | None:
        """The input of :mod:`lowrank_cli.adapter.fused_autograd` for ``x``; None if it cannot compute this linear.

        It needs a dense W without gradient, and updates of contiguous spans.
        """
        if not self._active or quantized(self.weight) or self.weight.requires_grad:
            return None
        if not all(is_view(span) for _, span in self._active):
            return None
        bias = getattr(self.base, "bias", None)
        if bias is not None and bias.requires_grad:
            return None
        device, weight = x.device.type, self.rows(None)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if weight.dtype not in (dtype, x.dtype):
            return None
        updates = [(module.terms(x, dtype), span) for module, span in self._active]
        known = [(terms, span) for terms, span in updates if terms is not None]
        if len(known) < len(updates):
            return None
        return FrozenLinear(weight.to(dtype), bias if bias is None else bias.to(dtype), known)

    @torch.no_grad()
    def merge(self) -> None:
        """Add every update to the base weight, once; a copy of the original weight stays on the CPU."""
        if self.merged:
            return
        self._unmerged = self.weight.detach().to("cpu", copy=True)
        for module, span in self.updates:
            rows = self.rows(span)
            rows.copy_(rows.float() + module.delta())
            self._write(span, rows)
        self._select_active()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight, bit for bit."""
        if self._unmerged is not None:
            self.weight.copy_(self._unmerged)
            self._unmerged = None
            self._select_active()
