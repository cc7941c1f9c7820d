"""LoRA: low-rank adaptation (Hu et al., ICLR 2022, arXiv 2106.09685, section 4.1).

y = W x + s · B A drop(x),   s = alpha / rank,   A: (R, I) Kaiming-uniform, B: (O, R) zero
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_range
from lowrank_cli.methods.protocol import Method
from lowrank_cli.schema import MethodConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.core import Adapter
    from lowrank_cli.adapter.linear import LowRank


@dataclass
class LowRankConfig(MethodConfig):
    """What every low-rank module has."""

    rank: int = MISSING  #: R, at most the smaller side of any target
    alpha: float = MISSING  #: the update is scaled by alpha / rank
    dropout: float = MISSING  #: probability of zeroing an input of A during training

    def validate(self) -> None:
        require_range("method.rank", self.rank, 1)
        if not self.alpha > 0:
            raise UserError(f"method.alpha: {self.alpha} must be above 0, or the update is nothing")
        require_range("method.dropout", self.dropout, 0, 0.99)


@dataclass
class LoRAConfig(LowRankConfig):
    """One low-rank module on each target linear."""

    #: ``all``, roles (Q K V O attention; G U D gate, up, down), or names of linears (``q_proj`` or a full path)
    target_modules: list[str] = MISSING

    def validate(self) -> None:
        super().validate()
        if not self.target_modules:
            raise UserError("method.target_modules: the list is empty; name roles (Q K V O G U D), linears, or all")


class LoRA(Method):
    """Freezes the model and trains one low-rank module for each target linear."""

    Config = LoRAConfig
    config: LoRAConfig

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """Wrap the target linears of ``model``; a classification head, where there is one, trains in full."""
        from lowrank_cli.adapter.core import inject
        from lowrank_cli.adapter.families import find_sites

        config = self.config
        sites = find_sites(model, list(config.target_modules))
        return inject(model, sites, rank=config.rank, alpha=config.alpha, dropout=config.dropout, kind=self.kind())

    def kind(self) -> Callable[..., LowRank]:
        """What makes a low-rank module."""
        from lowrank_cli.adapter.linear import LowRank

        return LowRank
