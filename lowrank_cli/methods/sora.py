"""SoRA: a gate for each rank is driven to exactly 0 by an l1 penalty, and takes its rank with it.

Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv 2311.11696, section 3:

    y = W x + s · B (g ⊙ (A drop(x))),   s = alpha / initial rank,   g ∈ R^R standard normal, B = 0 at the start
    after each step: g ← sign(g) · max(|g| − η λ, 0)   (proximal gradient of the penalty λ ‖g‖₁; η the learning rate)

Ranks whose gate is 0 may come back while their gradient exceeds the penalty. As in the authors' code, the step before
the threshold is the optimizer's (AdamW), not a plain gradient step.

Reconstruction: λ alone decides how many ranks are left. To compare at one budget, the ranks with the largest |g| of the
whole model, modules × ``rank`` at most, are kept when the last share of the steps begins; there the others stay 0 and
the gates that are left train without the penalty. Adapters are kept as the best only from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from lowrank_cli.errors import WorkFailed, require_range
from lowrank_cli.methods.adalora import BudgetConfig, inject_values
from lowrank_cli.methods.lora import LoRA

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.core import Adapter
    from lowrank_cli.methods.protocol import Step


@dataclass
class SoRAConfig(BudgetConfig):
    """Gated ranks, and how hard their gates are pushed to 0."""

    sparsity: float = MISSING  #: λ, weight of ‖g‖₁

    def validate(self) -> None:
        super().validate()
        require_range("method.sparsity", self.sparsity, 0)


class SoRA(LoRA):
    """LoRA with a sparse gate over the ranks of each module."""

    Config = SoRAConfig
    config: SoRAConfig

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """LoRA's modules with Gaussian gates; B = 0, so the bare model, exactly."""
        from torch import nn

        from lowrank_cli.adapter.allocation import Allocation

        adapter = inject_values(model, self.config)
        self.allocation = Allocation(adapter)
        for part in self.allocation.parts.values():
            nn.init.normal_(part.values)
        return adapter

    def after_step(self, step: Step) -> None:
        """The proximal step of all gates; the budget's choice once its time has come."""
        from lowrank_cli.adapter.allocation import keep_largest, soft_threshold

        if self.allocation.decided:
            self.allocation.enforce()
            return
        parts = self.allocation.parts
        for part in parts.values():
            part.values.data = soft_threshold(part.values.data, step.learning_rate * self.config.sparsity)
        if step.number >= self.config.budget_step(step.total):
            if not any(self.allocation.live_ranks().values()):
                raise WorkFailed(
                    f"every gate is 0 after step {step.number}: method.sparsity {self.config.sparsity} is too large"
                )
            sizes = {key: part.values.detach().abs() for key, part in parts.items()}
            self.allocation.decide(keep_largest(sizes, self.config.rank * len(parts)))

    def settled(self) -> bool:
        """Whether the final budget holds."""
        return self.allocation.decided

    def state(self) -> dict[str, torch.Tensor]:
        """The final masks, once there are any."""
        return self.allocation.state()

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None:
        """Continue where :meth:`state` was taken."""
        self.allocation.load_state(state)

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Parameters at the start and of the ranks left, and where these are."""
        return self.allocation.observations()
