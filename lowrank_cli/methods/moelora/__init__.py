"""MOELoRA: each linear has several small LoRA experts, and each token is routed to a few of them.

Liu et al., "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications", SIGIR 2024,
arXiv 2310.18339, section 3, as a baseline of MiLoRA (Zhang et al., arXiv 2410.18035): "8 experts of rank 4, a top-4
router per linear and per token", that is, the parameters of LoRA of rank 32 regrouped.

    y = W x + s · Σ_e g_e B_e A_e drop(x),   g = softmax over the k largest of W_r x, 0 for the others

Reconstruction: the MiLoRA paper gives the sizes only. Here the router is one matrix without bias on the linear's input;
the probabilities of the kept experts are renormalised to sum to 1; s = k · alpha / rank, so that a uniform router with
every expert kept is exactly LoRA of the same rank; the load balance (the Switch Transformer's, E · Σ_e f_e p̂_e) is
summed over all routers and counts every token of a batch except padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_range
from lowrank_cli.methods.lora import LoRA, LoRAConfig
from lowrank_cli.methods.protocol import Average, same

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
    from lowrank_cli.adapter.low_rank import LowRank


@dataclass
class MoELoRAConfig(LoRAConfig):
    """LoRA whose ``rank`` is shared by the experts of a linear: each has rank / experts."""

    experts: int = MISSING  #: E, of each linear; divides ``rank``
    k: int = MISSING  #: experts that a token activates; 1 to ``experts``
    load_balance: float = MISSING  #: weight of the load-balance loss

    def validate(self) -> None:
        super().validate()
        require_range("method.experts", self.experts, 1)
        if self.rank % self.experts:
            raise UserError(
                f"method.experts: {self.experts} experts cannot share method.rank {self.rank} evenly (a multiple can)"
            )
        require_range("method.k", self.k, 1, self.experts)
        require_range("method.load_balance", self.load_balance, 0)


class MoELoRA(LoRA):
    """LoRA modules of experts, routed token by token; decoding routes every new token."""

    Config = MoELoRAConfig
    config: MoELoRAConfig
    unmergeable = "its experts are chosen token by token"
    unprunable = "the ranks of an expert come and go together"

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """Experts at all target linears, whose load balance ignores padding."""
        from lowrank_cli.methods.moelora.experts import Experts, ignore_padding

        adapter = super().adapt(model)
        ignore_padding(model, [module for module in adapter.modules.values() if isinstance(module, Experts)])
        return adapter

    def kind(self) -> Callable[..., LowRank]:
        """Modules of experts."""
        from lowrank_cli.methods.moelora.experts import Experts

        return partial(Experts, experts=self.config.experts, k=self.config.k)

    def extra_loss(self, adapter: Adapter, average: Average = same) -> torch.Tensor:
        """The weighted load-balance loss of the forward pass that just ran."""
        from lowrank_cli.adapter.routing.router import load_balance
        from lowrank_cli.methods.moelora.experts import Experts

        modules = [module for module in adapter.modules.values() if isinstance(module, Experts)]
        layers = [module.probabilities for module in modules if module.probabilities is not None]
        return self.config.load_balance * load_balance(layers, average)

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Activated parameters of a token: k of E experts, and the routers in full."""
        experts = sum(module.lora_a.numel() + module.lora_b.numel() for module in adapter.modules.values())
        idle = experts * (self.config.experts - self.config.k) // self.config.experts
        return {"activated_parameters": adapter.count() - idle}, []
