"""Full fine-tuning: every parameter of the model trains. A reference for adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_cli.methods.protocol import Method
from lowrank_cli.schema import MethodConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter


@dataclass
class FullConfig(MethodConfig):
    """Nothing to set."""


class Full(Method):
    """Trains all weights; the adapter it saves is the whole model."""

    Config = FullConfig
    unprunable = "it has no low-rank modules"

    def rewrites(self) -> str:
        """All of them train."""
        return "trains them"

    def undivided(self) -> str:
        """Only frozen weights are divided."""
        return "trains them"

    def rate_scale(self) -> float:
        """A tenth at every model size ("LoRA Without Regret", Thinking Machines, 2025)."""
        return 0.1

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """Train every parameter (tied ones once)."""
        from lowrank_cli.adapter.adapted_model import Adapter

        adapter = Adapter(model, {})
        adapter.train_also(model, "")
        return adapter
