"""DoRA: weight-decomposed low-rank adaptation (Liu et al., ICML 2024, arXiv 2402.09353, section 4).

y = (m / ‖V‖) ⊙ (V x) + bias,   V = W + s · B A,   m trained, ‖V‖ row by row and a constant in the gradient
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_cli.methods.lora import LoRA, LoRAConfig

if TYPE_CHECKING:
    from lowrank_cli.adapter.low_rank import LowRank


@dataclass
class DoRAConfig(LoRAConfig):
    """LoRA's settings; the magnitudes have none."""


class DoRA(LoRA):
    """LoRA that learns the length of each row of the updated weight separately from its direction."""

    Config = DoRAConfig

    def kind(self) -> type[LowRank]:
        from lowrank_cli.adapter.kinds.dora import Decomposed

        return Decomposed
