"""The KV cache of a forward pass, under whatever name this version of transformers has for it.

transformers called the argument and the field of the output ``past_key_values`` up to 5.23 and calls them ``cache``
since. A cache is recognised by its type here, so that no name is needed to read one.

:func:`growing_cache` makes one for generation that does not copy all tokens with each new one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

NAMES = ("cache", "past_key_values")  #: of the argument of a model's forward, newest first


def given_cache(args: tuple, kwargs: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a forward pass, by whatever name."""
    caches = {id(value): value for value in (*args, *kwargs.values()) if isinstance(value, Cache)}
    assert len(caches) < 2, "a forward pass with two KV caches"
    for name in NAMES:
        value = kwargs.get(name)
        assert value is None or isinstance(value, Cache), f"{name}: a {type(value).__name__} is no KV cache"
    return next(iter(caches.values()), None)


def returned_cache(output: Any) -> Cache | None:
    """The KV cache in what a forward pass returned, if any."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def pass_cache(model: nn.Module, cache: Cache | None) -> dict[str, Cache]:
    """``cache`` as a keyword argument of this model's forward; empty for None."""
    if cache is None:
        return {}
    accepted = inspect.signature(model.forward).parameters
    name = next((name for name in NAMES if name in accepted), None)
    assert name, f"{type(model).__name__}.forward takes no KV cache (looked for: {', '.join(NAMES)})"
    return {name: cache}


def continued_cache(args: tuple, kwargs: Mapping[str, Any], tokens: int) -> Cache | None:
    """The KV cache whose sequences a forward pass of ``tokens`` new tokens continues; None if it starts new ones.

    A pass without such a cache whose attention mask (B, T) covers more than its tokens continues something that is not
    recognised; to take it for a new prompt would be a guess, so it is an error.
    """
    cache = given_cache(args, kwargs)
    if cache is not None and cache.get_seq_length() > 0:
        return cache
    mask = kwargs.get("attention_mask")
    covered = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else tokens
    assert cache is not None or covered <= tokens, (
        f"the attention mask covers {covered} tokens, the forward pass has {tokens} and no KV cache that is known here"
    )
    return None


def growing_cache(model: PreTrainedModel, new_tokens: int) -> dict[str, Cache]:
    """An empty KV cache with room for a prompt and ``new_tokens`` more, as a keyword argument of ``generate``.

    Layers with a sliding window, whose caches drop tokens, are those of transformers; empty for a model that keeps a
    cache of its own kind.
    """
    if not type(model)._supports_default_dynamic_cache():  # type: ignore[attr-defined]
        return {}
    cache = DynamicCache(config=model.config)
    cache.layers = [Growing(new_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return pass_cache(model, cache)


class Growing(DynamicLayer):
    """A layer of a KV cache whose storage has room for more tokens: a step writes one, ``DynamicLayer`` copies all.

    ``keys`` and ``values`` (B, H, T, D) are views of that storage. Whatever else is put in their place (cropped,
    selected rows) gets storage of its own with the next token.
    """

    def __init__(self, room: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room  #: tokens beyond those that need new storage
        self._keys, self._values = Storage(), Storage()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, those of new tokens (B, H, t, D) last."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._keys.extended(self.keys, key_states, self.room)
        self.values = self._values.extended(self.values, value_states, self.room)
        return self.keys, self.values


class Storage:
    """Where the tensor that :meth:`extended` last returned lies, with room behind its tokens."""

    def __init__(self) -> None:
        self._tensor = torch.empty(0)
        self._view: Tensor | None = None

    def extended(self, old: Tensor | None, new: Tensor, room: int) -> Tensor:
        """``new`` (B, H, t, D) behind ``old`` (B, H, T, D), which a new cache has not: (B, H, T + t, D)."""
        before, count = old.shape[-2] if old is not None and old.numel() else 0, new.shape[-2]
        after = before + count
        if old is not self._view or after > self._tensor.shape[-2]:
            self._tensor = new.new_empty(*new.shape[:-2], after + room, new.shape[-1])
            if old is not None and before:
                self._tensor.narrow(-2, 0, before).copy_(old)
        self._tensor.narrow(-2, before, count).copy_(new)  # narrow is cheaper than an index, and steps are many
        self._view = self._tensor.narrow(-2, 0, after)
        return self._view
