"""LoRA-FA: LoRA with A frozen at its random initial values (Zhang et al. 2023, arXiv 2308.03303, section 3).

y = W x + s · B A drop(x),   s = alpha / rank,   A: (R, I) random and fixed, B: (O, R) zero, trained

ΔW stays in the row space of A. The gradient of B, s · gᵀ (A drop(x)), needs R numbers for each token, so the input of a
linear (I numbers for each token) is not saved for its update: that is the method's memory claim. With recomputed inputs
(hardware.gradient_checkpointing=feed_forward) LoRA does not save them either.

A is Kaiming-uniform, as in our LoRA; the paper draws it from a normal distribution. It is saved with B. Omitted: the
correction (s² A Aᵀ)⁻¹ of B's gradient in the paper's second version (2026). The rows of a random A are nearly
orthogonal and equally long, so the correction is nearly a constant factor, to which Adam is invariant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lowrank_cli.methods.lora import LoRA, LoRAConfig

if TYPE_CHECKING:
    from lowrank_cli.adapter.low_rank import LowRank


@dataclass
class LoRAFAConfig(LoRAConfig):
    """LoRA's settings."""


class LoRAFA(LoRA):
    """LoRA that trains B alone."""

    Config = LoRAFAConfig

    def kind(self) -> Callable[..., LowRank]:
        """LoRA's module with A fixed."""
        return partial(super().kind(), fixed=["lora_A.weight"])
