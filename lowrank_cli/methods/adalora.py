"""AdaLoRA: the least important ranks are pruned, by the importance of their singular triplets.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, arXiv 2303.10512, section 3:

    y = W x + s · P Λ Q drop(x),   s = alpha / initial rank,   P: (O, R), Λ = diag: (R,), Q: (R, I)
    loss = cross-entropy + orthogonality · Σ_modules (‖Pᵀ P − 1‖² + ‖Q Qᵀ − 1‖²)

P and Q start Gaussian, Λ at 0. After an initial share of the steps, every ``interval`` steps Λ is set to 0 for all
ranks but the b(t) most important of the whole model (they may grow back); b falls on a cubic schedule from modules ×
initial rank to modules × ``rank``. For the final share of the steps the budget is fixed, and other ranks leave the
adapter.

Reconstruction: the paper's schedule b(t) as printed jumps at its end; here it reaches the budget at T − t_f. The paper
gives t_i and t_f in steps; here they are shares of all steps, so one file fits any length. Adapters can be kept as the
best only once the budget is fixed. The penalty is the paper's sum of squares; the authors' code weights the mean of the
norms, which is smaller by orders of magnitude, with γ = 0.1. On the sum that weight drowns the task's gradient in short
runs, so the default is 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_range
from lowrank_cli.methods.lora import LoRA, LoRAConfig
from lowrank_cli.methods.protocol import Average, same

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
    from lowrank_cli.adapter.kinds.rank_values import Importance
    from lowrank_cli.adapter.low_rank import LowRank
    from lowrank_cli.methods.protocol import Step


@dataclass
class BudgetConfig(LoRAConfig):
    """LoRA that starts with more ranks than its budget: ``rank`` is the final mean rank of a module."""

    start_rank_key: ClassVar[str] = "initial_rank"
    initial_rank: Optional[int] = MISSING  #: of every module at the start; null is twice ``rank``
    final_share: float = MISSING  #: share of all steps, the last ones, at the final budget

    def validate(self) -> None:
        super().validate()
        require_range("method.initial_rank", self.start_rank, self.rank)
        require_range("method.final_share", self.final_share, 0, 1)

    @property
    def start_rank(self) -> int:
        return 2 * self.rank if self.initial_rank is None else self.initial_rank

    def budget_step(self, total: int) -> int:
        """The step of ``total`` after which the final budget holds."""
        return max(1, total - round(self.final_share * total))


@dataclass
class AdaLoRAConfig(BudgetConfig):
    """Singular triplets, and the schedule of their budget."""

    initial_share: float = MISSING  #: share of all steps, the first ones, before any rank is pruned
    interval: int = MISSING  #: steps from one allocation to the next
    beta1: float = MISSING  #: β₁, smoothing of the sensitivity
    beta2: float = MISSING  #: β₂, smoothing of its uncertainty
    orthogonality: float = MISSING  #: γ, weight of the orthogonality of P and Q

    def validate(self) -> None:
        super().validate()
        require_range("method.initial_share", self.initial_share, 0, 1)
        if self.initial_share + self.final_share > 1:
            raise UserError(
                f"method.initial_share: {self.initial_share} and method.final_share {self.final_share} "
                f"are together above 1"
            )
        require_range("method.interval", self.interval, 1)
        require_range("method.beta1", self.beta1, 0, 1)
        require_range("method.beta2", self.beta2, 0, 1)
        require_range("method.orthogonality", self.orthogonality, 0)


def observe_budget(adapter: Adapter) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Initial parameters, and the remaining ranks with their heat map."""
    from lowrank_cli.adapter.kinds.rank_values import initial_parameters
    from lowrank_cli.scoring.heatmaps import allocation

    ranks = sum(adapter.ranks().values())
    return {
        "initial_parameters": initial_parameters(adapter),
        "ranks": ranks,
        "modules": len(adapter.modules),
    }, [allocation(adapter)]


class AdaLoRA(LoRA):
    """LoRA in the form of a singular value decomposition, pruned to a budget by importance."""

    Config = AdaLoRAConfig
    config: AdaLoRAConfig

    def __init__(self, config: AdaLoRAConfig):
        super().__init__(config)
        self.importance: Importance | None = None  # from the first step until the final budget holds
        self._settled = False

    def needs_adam(self) -> str:
        """Pruned ranks lose theirs."""
        return "prunes ranks with their moments"

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """P and Q Gaussian, with the deviation of the authors' code; Λ = 0, so the function does not change."""
        from torch import nn

        from lowrank_cli.adapter.kinds.rank_values import value_modules

        adapter = super().adapt(model)
        for module in value_modules(adapter).values():
            nn.init.normal_(module.lora_a, std=0.02)
            nn.init.normal_(module.lora_b, std=0.02)
            nn.init.zeros_(module.values)
        return adapter

    def kind(self) -> type[LowRank]:
        """Modules with a value for each rank."""
        from lowrank_cli.adapter.kinds.rank_values import RankValues

        return RankValues

    def extra_loss(self, adapter: Adapter, average: Average = same) -> torch.Tensor:
        """γ · Σ_modules (‖Pᵀ P − 1‖² + ‖Q Qᵀ − 1‖²)."""
        import torch

        from lowrank_cli.adapter.kinds.rank_values import orthogonality

        terms = [orthogonality(module.lora_b.t()) + orthogonality(module.lora_a) for module in adapter.modules.values()]
        return self.config.orthogonality * torch.stack(terms).sum()

    def before_step(self, step: Step) -> None:
        """Update the importance with the current weights and gradients."""
        if not self._settled:
            self.importance = self.importance or self._importance(step.adapter)
            self.importance.update({name: weight.grad for name, weight in self.importance.weights.items()})

    def _importance(self, adapter: Adapter) -> Importance:
        """A fresh importance of the current ranks, which may be fewer than the initial ones in a continued run."""
        from lowrank_cli.adapter.kinds.rank_values import Importance

        return Importance(adapter, self.config.beta1, self.config.beta2)

    def after_step(self, step: Step) -> None:
        """Apply this step's budget; once it is final, remove the other ranks."""
        from lowrank_cli.adapter.kinds.rank_values import cubic_budget, keep_largest, remove_ranks, zero_values

        if self.importance is None:
            return
        config, adapter, modules = self.config, step.adapter, len(step.adapter.modules)
        last = config.budget_step(step.total)
        first = min(round(config.initial_share * step.total), last - 1)
        budget = cubic_budget(step.number, first, last, modules * config.start_rank, modules * config.rank)
        if step.number >= last:
            remove_ranks(adapter, keep_largest(self.importance.scores(), budget), step.optimizer)
            self.importance, self._settled = None, True
        elif step.number > first and step.number % config.interval == 0:
            zero_values(adapter, keep_largest(self.importance.scores(), budget))

    def unsettled(self) -> str | None:
        """Unsettled until the final budget holds."""
        return None if self._settled else "more ranks than the budget"

    def state(self) -> dict[str, torch.Tensor]:
        """The moving averages, while ranks are still pruned."""
        return self.importance.state() if self.importance else {}

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`state`."""
        self._settled = not state
        if state:
            self.importance = self._importance(adapter)
            self.importance.load_state(state)

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """See :func:`observe_budget`."""
        return observe_budget(adapter)
