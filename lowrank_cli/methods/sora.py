"""SoRA: a gate for each rank is driven to exactly 0 by an l1 penalty, and takes its rank with it.

Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv 2311.11696, section 3:

    y = W x + s · B (g ⊙ (A drop(x))),   s = alpha / initial rank,   g ∈ R^R standard normal, B = 0 at the start
    after each step: g ← sign(g) · max(|g| − η λ, 0)   (proximal gradient of the penalty λ ‖g‖₁; η the learning rate)

Ranks whose gate is 0 may come back while their gradient exceeds the penalty. As in the authors' code, the step before
the threshold is the optimizer's (AdamW), not a plain gradient step.

Reconstruction: λ alone decides how many ranks are left. To compare at one budget, the ranks with the largest |g| of the
whole model, modules × ``rank`` at most, are kept when the last share of the steps begins; the others leave the adapter,
and the gates that are left train without the penalty. Adapters are kept as the best only from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from lowrank_cli.errors import WorkFailed, require_range
from lowrank_cli.methods.adalora import BudgetConfig, inject_values, observe_budget
from lowrank_cli.methods.lora import LoRA

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
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

    def __init__(self, config: SoRAConfig):
        super().__init__(config)
        self._settled = False

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """LoRA's modules with Gaussian gates; B = 0, so the bare model, exactly."""
        from torch import nn

        from lowrank_cli.adapter.kinds.rank_values import value_modules

        adapter = inject_values(model, self.config)
        for part in value_modules(adapter).values():
            nn.init.normal_(part.values)
        return adapter

    def after_step(self, step: Step) -> None:
        """The proximal step of all gates; the budget's choice once its time has come."""
        from lowrank_cli.adapter.kinds.rank_values import keep_largest, remove_ranks, soft_threshold, value_modules

        if self._settled:
            return
        parts = value_modules(step.adapter)
        for part in parts.values():
            part.values.data = soft_threshold(part.values.data, step.learning_rate * self.config.sparsity)
        if step.number < self.config.budget_step(step.total):
            return
        sizes = {key: part.values.detach().abs() for key, part in parts.items()}
        kept = keep_largest(sizes, self.config.rank * len(parts))
        masks = {key: kept[key] & (size > 0) for key, size in sizes.items()}
        if not any(mask.any() for mask in masks.values()):
            raise WorkFailed(
                f"every gate is 0 after step {step.number}: method.sparsity {self.config.sparsity} is too large"
            )
        remove_ranks(step.adapter, masks, step.optimizer)
        self._settled = True

    def unsettled(self) -> str | None:
        """Until the final budget holds."""
        return None if self._settled else "more ranks than the budget"

    def state(self) -> dict[str, torch.Tensor]:
        """Whether the final budget holds; the gates are the adapter's."""
        import torch

        return {"settled": torch.tensor(self._settled)}

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None:
        """Continue where :meth:`state` was taken."""
        self._settled = bool(state["settled"])

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Parameters at the start, the ranks left and where they are."""
        return observe_budget(adapter)
