"""The KV cache of a forward pass, under whatever name this version of transformers has for it.

transformers called the argument and the field of the output ``past_key_values`` up to 5.23 and calls them ``cache``
since. A cache is recognised by its type here, so that no name is needed to read one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Cache

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
