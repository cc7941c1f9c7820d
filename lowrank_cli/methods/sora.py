"""SoRA: an l1 penalty drives the gates of ranks to exactly 0, which removes the ranks.

Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv 2311.11696, section 3:

    y = W x + s · B (g ⊙ (A drop(x))),   s = alpha / initial rank,   g ∈ R^R standard normal, B = 0 at the start
    after each step: g ← sign(g) · max(|g| − η λ, 0)   (proximal gradient of the penalty λ ‖g‖₁; η the learning rate)

Ranks with gate 0 come back if their gradient exceeds the penalty. As in the authors' code, the step before the
threshold is the optimizer's (AdamW), not a plain gradient step.

Reconstruction: λ alone decides how many ranks remain. To compare methods at the same budget, when the final share of
steps begins, at most modules × ``rank`` ranks are kept, those with the largest |g| of the whole model; the others leave
the adapter, and the remaining gates train without the penalty. Only from then on can an adapter be kept as the best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from lowrank_cli.errors import WorkFailed, require_range
from lowrank_cli.methods.adalora import BudgetConfig, observe_budget
from lowrank_cli.methods.lora import LoRA

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
    from lowrank_cli.adapter.low_rank import LowRank
    from lowrank_cli.methods.protocol import Step


@dataclass
class SoRAConfig(BudgetConfig):
    """Gated ranks, and the penalty on their gates."""

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

    def needs_adam(self) -> str:
        """The proximal step is made for its step sizes; pruned ranks lose theirs."""
        return "prunes ranks with their moments"

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """LoRA's modules with Gaussian gates; B = 0, so the function does not change."""
        from torch import nn

        from lowrank_cli.adapter.kinds.rank_values import value_modules

        adapter = super().adapt(model)
        for module in value_modules(adapter).values():
            nn.init.normal_(module.values)
        return adapter

    def kind(self) -> type[LowRank]:
        """Modules with a gate for each rank."""
        from lowrank_cli.adapter.kinds.rank_values import RankValues

        return RankValues

    def after_step(self, step: Step) -> None:
        """The proximal step of all gates; at the start of the final share, prune to the budget."""
        from lowrank_cli.adapter.kinds.rank_values import keep_largest, remove_ranks, soft_threshold, value_modules

        if self._settled:
            return
        modules = value_modules(step.adapter)
        for module in modules.values():
            module.values.data = soft_threshold(module.values.data, step.learning_rate * self.config.sparsity)
        if step.number < self.config.budget_step(step.total):
            return
        sizes = {key: module.values.detach().abs() for key, module in modules.items()}
        kept = keep_largest(sizes, self.config.rank * len(modules))
        masks = {key: kept[key] & (size > 0) for key, size in sizes.items()}
        if not any(mask.any() for mask in masks.values()):
            raise WorkFailed(
                f"every gate is 0 after step {step.number}: method.sparsity {self.config.sparsity} is too large"
            )
        remove_ranks(step.adapter, masks, step.optimizer)
        self._settled = True

    def unsettled(self) -> str | None:
        """Unsettled until the final budget holds."""
        return None if self._settled else "more ranks than the budget"

    def state(self) -> dict[str, torch.Tensor]:
        """Whether the final budget holds; the gates belong to the adapter."""
        import torch

        return {"settled": torch.tensor(self._settled)}

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`state`."""
        self._settled = bool(state["settled"])

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Initial parameters, and the remaining ranks with their heat map."""
        return observe_budget(adapter)
