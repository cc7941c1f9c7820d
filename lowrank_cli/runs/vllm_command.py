"""The command line with which vLLM serves LoRAs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  #: what ``vllm serve --max-lora-rank`` takes; 16 is its default


def rank_step(rank: int) -> int | None:
    """The smallest of :data:`RANKS` that has room for ``rank``; None if it is too large."""
    return next((step for step in RANKS if step >= rank), None)


def vllm_serve(base: str, rank: int, adapters: Mapping[str, str]) -> str | None:
    """The command that serves ``adapters``, folders by name, on the model ``base``; None if ``rank`` is too large.

    Args:
        rank: the largest of the adapters.
    """
    if (step := rank_step(rank)) is None:
        return None
    options = ["--max-lora-rank", str(step), *(["--max-loras", str(len(adapters))] if len(adapters) > 1 else [])]
    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    return shlex.join(["vllm", "serve", base, "--enable-lora", *options, "--lora-modules", *modules])
