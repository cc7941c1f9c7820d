"""The KV cache of a forward pass, whatever this version of transformers calls it.

The argument and the output field are called ``past_key_values`` up to transformers 5.23 and ``cache`` since. Caches are
recognised by type here, not by name.

:func:`growing_cache` makes a cache for generation that does not copy all tokens at every step.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

NAMES = ("cache", "past_key_values")  #: names of the argument, newest first


def given_cache(args: tuple, kwargs: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a forward pass, if any."""
    caches = {id(value): value for value in (*args, *kwargs.values()) if isinstance(value, Cache)}
    assert len(caches) < 2, "a forward pass with two KV caches"
    for name in NAMES:
        value = kwargs.get(name)
        assert value is None or isinstance(value, Cache), f"{name}: a {type(value).__name__} is no KV cache"
    return next(iter(caches.values()), None)


def returned_cache(output: Any) -> Cache | None:
    """The KV cache in the output of a forward pass, if any."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def pass_cache(model: nn.Module, cache: Cache | None) -> dict[str, Cache]:
    """``cache`` as a keyword argument of the model's forward; empty for None."""
    if cache is None:
        return {}
    accepted = inspect.signature(model.forward).parameters
    name = next((name for name in NAMES if name in accepted), None)
    assert name, f"{type(model).__name__}.forward takes no KV cache (looked for: {', '.join(NAMES)})"
    return {name: cache}


def continued_cache(args: tuple, kwargs: Mapping[str, Any], tokens: int) -> Cache | None:
    """The KV cache that a forward pass of ``tokens`` new tokens continues; None if it starts new sequences.

    An attention mask (B, T) longer than the tokens, without a known cache, is an error rather than a new prompt.
    """
    cache = given_cache(args, kwargs)
    if cache is not None and cache.get_seq_length() > 0:
        return cache
    mask = kwargs.get("attention_mask")
    covered = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else tokens
    assert cache is not None or covered <= tokens, (
        f"the attention mask covers {covered} tokens, but the forward pass has {tokens} and no known KV cache"
    )
    return None


def growing_cache(model: PreTrainedModel, new_tokens: int) -> dict[str, Cache]:
    """An empty KV cache with room for a prompt and ``new_tokens`` more, as a keyword argument of ``generate``.

    Layers with a sliding window keep transformers' cache, which drops tokens. Returns an empty dict for models with a
    cache type of their own.
    """
    if not type(model)._supports_default_dynamic_cache():  # type: ignore[attr-defined]
        return {}
    cache = DynamicCache(config=model.config)
    cache.layers = [Growing(new_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return pass_cache(model, cache)


class Growing(DynamicLayer):
    """A layer of a KV cache with spare storage: a step writes one token, where ``DynamicLayer`` copies all.

    ``keys`` and ``values`` (B, H, T, D) are views of the storage. If something replaces them (cropping, selecting
    rows), the next token allocates new storage.
    """

    def __init__(self, room: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room  #: spare tokens of a new storage
        self._keys, self._values = Storage(), Storage()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens (B, H, t, D) and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._keys.extended(self.keys, key_states, self.room)
        self.values = self._values.extended(self.values, value_states, self.room)
        return self.keys, self.values


class Storage:
    """A growing buffer; the last result of :meth:`extended` is a view of it."""

    def __init__(self) -> None:
        self._tensor = torch.empty(0)
        self._view: Tensor | None = None

    def extended(self, old: Tensor | None, new: Tensor, room: int) -> Tensor:
        """Append ``new`` (B, H, t, D) to ``old`` (B, H, T, D), None in a new cache: (B, H, T + t, D)."""
        before, count = old.shape[-2] if old is not None and old.numel() else 0, new.shape[-2]
        after = before + count
        if old is not self._view or after > self._tensor.shape[-2]:
            self._tensor = new.new_empty(*new.shape[:-2], after + room, new.shape[-1])
            if old is not None and before:
                self._tensor.narrow(-2, 0, before).copy_(old)
        self._tensor.narrow(-2, before, count).copy_(new)  # narrow is cheaper than indexing, and this runs every step
        self._view = self._tensor.narrow(-2, 0, after)
        return self._view
