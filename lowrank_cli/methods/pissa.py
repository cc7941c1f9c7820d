"""PiSSA: LoRA on the principal singular components (Meng et al., NeurIPS 2024, arXiv 2404.02948, section 3).

    W = U S Vᵀ;   B₀ = U[:, :R] S[:R]^½,   A₀ = S[:R]^½ V[:, :R]ᵀ,   y = (W − s·B₀A₀) x + s·B A x

The published setting is s = 1 (alpha = rank); another s divides B₀A₀, as in the PEFT library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_cli.methods.lora import LoRA, LoRAConfig

if TYPE_CHECKING:
    from lowrank_cli.adapter.low_rank import LowRank


@dataclass
class PiSSAConfig(LoRAConfig):
    """LoRA's settings; ``rank`` counts principal components."""


class PiSSA(LoRA):
    """Trains the principal components of each target linear and freezes the rest."""

    Config = PiSSAConfig
    unprunable = "its update is the trained components minus the initial ones, so no rank can be judged alone"

    def kind(self) -> type[LowRank]:
        from lowrank_cli.adapter.kinds.svd_window import PrincipalWindow

        return PrincipalWindow
