"""The command lines with which vLLM and SGLang serve LoRAs, and what vLLM does not take."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

#: Model types that vLLM 0.32 implements without LoRA.
WITHOUT_LORA = frozenset("bloom dbrx falcon gemma3n_text gpt2 gptj llama4_text mamba mamba2 stablelm zamba2".split())
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  #: what ``vllm serve --max-lora-rank`` takes; 16 is its default


def rank_step(rank: int) -> int | None:
    """The smallest of :data:`RANKS` that has room for ``rank``; None if it is too large."""
    return next((step for step in RANKS if step >= rank), None)


def vllm_serve(base: str, model_type: str, rank: int, adapters: Mapping[str, str]) -> str | None:
    """The command that serves ``adapters``, folders by name, on the model ``base``; None if vLLM cannot.

    Args:
        rank: the largest of the adapters.
    """
    if vllm_refusal(model_type, rank):
        return None
    step = rank_step(rank)
    options = ["--max-lora-rank", str(step), *(["--max-loras", str(len(adapters))] if len(adapters) > 1 else [])]
    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    return shlex.join(["vllm", "serve", base, "--enable-lora", *options, "--lora-modules", *modules])


def sglang_serve(base: str, adapters: Mapping[str, str]) -> str:
    """The command with which SGLang serves ``adapters``, folders by name, on the model ``base``."""
    paths = [f"{name}={folder}" for name, folder in adapters.items()]
    return shlex.join(["python", "-m", "sglang.launch_server", "--model-path", base, "--lora-paths", *paths])


def vllm_refusal(model_type: str, rank: int) -> str:
    """Why vLLM cannot serve a LoRA of ``rank`` on such a model, and what works instead; empty if it can."""
    if model_type in WITHOUT_LORA:
        return f"vllm has no LoRAs for models of type {model_type} (allowed: peft; or export.format=merged)"
    if rank_step(rank) is None:
        return f"vllm takes LoRAs of rank {RANKS[-1]} at most, and this one has {rank}; set export.rank={RANKS[-1]}"
    return ""
