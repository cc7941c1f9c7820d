"""AdaLoRA: ranks are pruned where they matter least, by the importance of their singular triplets.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, arXiv 2303.10512, section 3:

    y = W x + s · P Λ Q drop(x),   s = alpha / initial rank,   P: (O, R), Λ = diag: (R,), Q: (R, I)
    loss = cross-entropy + orthogonality · Σ_modules (‖Pᵀ P − 1‖² + ‖Q Qᵀ − 1‖²)

P and Q start Gaussian, Λ at 0. After a first share of the steps, every ``interval`` steps the Λ of all ranks but the
b(t) most important of the whole model are set to 0 (they may come back); b falls by a cubic schedule from modules ×
initial rank to modules × ``rank``. This budget holds for the last share of the steps; ranks outside it leave the
adapter.

Reconstruction: the paper's schedule b(t) as printed jumps at its end; here it reaches the budget at T − t_f. The paper
gives t_i and t_f in steps; here they are shares of all steps, so that one file fits any length. Adapters are kept as
the best only from the step on at which the budget holds. The penalty is the paper's sum of squares; the authors' code
weighs the mean of the norms, which is smaller by orders of magnitude, with γ = 0.1. That weight on the sum drowns the
task's gradient in short runs, so the default is 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_range
from lowrank_cli.methods.lora import LoRA, LoRAConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
    from lowrank_cli.adapter.kinds.rank_values import Importance
    from lowrank_cli.methods.protocol import Step


@dataclass
class BudgetConfig(LoRAConfig):
    """LoRA that starts with more ranks than it may keep: ``rank`` is the mean rank of a module in the end."""

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
        """The step of ``total`` from whose end on the final budget holds."""
        return max(1, total - round(self.final_share * total))


@dataclass
class AdaLoRAConfig(BudgetConfig):
    """Triplets of singular vectors and values, and how their budget falls."""

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


def inject_values(model: PreTrainedModel, config: BudgetConfig) -> Adapter:
    """Modules of the initial rank with a value for each rank."""
    from lowrank_cli.adapter.adapted_model import inject
    from lowrank_cli.adapter.kinds.rank_values import RankValues
    from lowrank_cli.adapter.target_sites import find_sites

    sites = find_sites(model, list(config.target_modules))
    rank = config.start_rank
    return inject(
        model, sites, rank=rank, alpha=config.alpha, dropout=config.dropout, kind=RankValues, rank_key="initial_rank"
    )


def observe_budget(adapter: Adapter) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Parameters at the start beside those of the ranks left, and a heat map of these."""
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

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """P and Q Gaussian with the deviation of the authors' code, Λ = 0: the bare model, exactly."""
        from torch import nn

        from lowrank_cli.adapter.kinds.rank_values import value_modules

        adapter = inject_values(model, self.config)
        for part in value_modules(adapter).values():
            nn.init.normal_(part.lora_a, std=0.02)
            nn.init.normal_(part.lora_b, std=0.02)
            nn.init.zeros_(part.values)
        return adapter

    def extra_loss(self, adapter: Adapter) -> torch.Tensor:
        """γ · Σ_modules (‖Pᵀ P − 1‖² + ‖Q Qᵀ − 1‖²)."""
        import torch

        from lowrank_cli.adapter.kinds.rank_values import orthogonality

        terms = [orthogonality(part.lora_b.t()) + orthogonality(part.lora_a) for part in adapter.modules.values()]
        return self.config.orthogonality * torch.stack(terms).sum()

    def before_step(self, step: Step) -> None:
        """Importance of the weights by the gradients that are about to move them."""
        if not self._settled:
            self.importance = self.importance or self._importance(step.adapter)
            self.importance.update({name: weight.grad for name, weight in self.importance.weights.items()})

    def _importance(self, adapter: Adapter) -> Importance:
        """Of the ranks that there are: fewer than at the start, where training goes on from another run."""
        from lowrank_cli.adapter.kinds.rank_values import Importance

        return Importance(adapter, self.config.beta1, self.config.beta2)

    def after_step(self, step: Step) -> None:
        """Allocate the budget of this step; the final one for good."""
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
        """Until the final budget holds."""
        return None if self._settled else "more ranks than the budget"

    def state(self) -> dict[str, torch.Tensor]:
        """The moving averages, until they have served."""
        return self.importance.state() if self.importance else {}

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None:
        """Continue where :meth:`state` was taken."""
        self._settled = not state
        if state:
            self.importance = self._importance(adapter)
            self.importance.load_state(state)

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Parameters at the start, the ranks left and where they are."""
        return observe_budget(adapter)
