"""MiLoRA: every LoRA module is an expert, routed once per prompt.

Zhang et al., "MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning",
Findings of EMNLP 2024, arXiv 2410.18035, section 3. In front of layer l a router sees the prompt's hidden states only:

    p_l = softmax(Ra(pool(H_l)) W_r);   keep the k largest;   gate of a kept module = k · p / Σ_kept p
    loss = cross-entropy + load_balance · Σ_l N · Σ_i f_i p̂_i

with Ra a learnable rational function that starts as GeLU. MiDoRA is the same with DoRA's modules (``modules: dora``).

Reconstruction: the paper does not say how the kept probabilities enter the module's output. With ``gate: scaled`` they
scale it, as above, so that gradients reach the router and an all-equal router with k = N is exactly LoRA. With
``straight_through`` a kept module is used as it is, and its probability gets the gradient of a gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range
from lowrank_cli.methods.lora import LoRA, LoRAConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.core import Adapter
    from lowrank_cli.adapter.linear import LowRank
    from lowrank_cli.adapter.router import Router
    from lowrank_cli.methods.protocol import Step

POOLERS = ("self_attention", "average", "max", "last_token")
ACTIVATIONS = ("rational", "gelu", "relu")
ROLES = "QKVOGUD"  #: each one module of a layer


@dataclass
class MiLoRAConfig(LoRAConfig):
    """Low-rank modules, a router in front of each layer, and how the router is trained."""

    modules: str = MISSING  #: ``lora`` or ``dora`` (MiDoRA)
    k: int = MISSING  #: modules active in each layer for a prompt; 1 to the number of target roles
    gate: str = MISSING  #: ``scaled`` (with k = 1 only the load balance trains the router) or ``straight_through``
    pooler: str = MISSING  #: prompt tokens to one vector: ``self_attention``, ``average``, ``max`` or ``last_token``
    #: ``rational`` (learned), ``gelu`` or ``relu``; several names go to equal shares of the layers, first to last
    activation: list[str] = MISSING
    numerator_order: int = MISSING  #: m of ``rational``, whose coefficients are a_0 … a_m; 3 to 8
    denominator_order: int = MISSING  #: n of ``rational``, whose coefficients are b_1 … b_n; 2 to m − 1
    load_balance: float = MISSING  #: λ_lb, weight of the load-balance loss
    bilevel: bool = MISSING  #: step the activations' coefficients on dev batches, everything else on train batches
    activation_learning_rate: float = MISSING  #: of the activations' coefficients, when ``bilevel``

    def validate(self) -> None:
        super().validate()
        require_choice("method.modules", self.modules, ("lora", "dora"))
        require_choice("method.gate", self.gate, ("scaled", "straight_through"))
        require_choice("method.pooler", self.pooler, POOLERS)
        if not self.activation:
            raise UserError(f"method.activation: the list is empty (allowed: {', '.join(ACTIVATIONS)})")
        for name in self.activation:
            require_choice("method.activation", name, ACTIVATIONS)
        if self.bilevel and "rational" not in self.activation:
            raise UserError(
                f"method.bilevel: true, but method.activation={list(self.activation)} has no coefficients to learn "
                f"(allowed: false, or rational among the activations)"
            )
        require_range("method.numerator_order", self.numerator_order, 3, 8)
        require_range("method.denominator_order", self.denominator_order, 2, self.numerator_order - 1)
        require_range("method.k", self.k, 1, 7)
        if set(self.target_modules) <= set(ROLES):
            self.check_k(len(set(self.target_modules)))
        require_range("method.load_balance", self.load_balance, 0)
        require_range("method.activation_learning_rate", self.activation_learning_rate, 0)

    def check_k(self, modules: int) -> None:
        """Raise UserError unless ``k`` of so many ``modules`` of a layer can be active."""
        if not 1 <= self.k <= modules:
            raise UserError(
                f"method.k: {self.k} is out of range (allowed: 1 to {modules}): it is how many modules of a layer are "
                f"active, and method.target_modules=[{','.join(self.target_modules)}] has {modules}; set method.k"
            )


class MiLoRA(LoRA):
    """LoRA (or DoRA) whose modules are switched per prompt by one router a layer."""

    Config = MiLoRAConfig
    config: MiLoRAConfig
    unmergeable = "its modules are chosen prompt by prompt"
    unprunable = "a module serves the prompts that its router sends to it, and no others"

    def __init__(self, config: MiLoRAConfig):
        super().__init__(config)
        self._optimizer: torch.optim.Optimizer | None = None

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """LoRA's modules, then a router in front of each layer. Refuses linears outside the layers' roles."""
        from lowrank_cli.adapter.families import layers, layers_path
        from lowrank_cli.adapter.router import GATES
        from lowrank_cli.adapter.routing import PromptRouting

        adapter = super().adapt(model)
        strangers = [site.path for site in adapter.sites.values() if site.layer is None]
        if strangers:
            raise UserError(f"method.target_modules: '{strangers[0]}' has no role in a layer; milora routes roles")
        self.roles = list(dict.fromkeys(str(site.role) for site in adapter.sites.values()))
        self.config.check_k(len(self.roles))
        blocks = layers(model)
        found = {(site.layer, site.role): adapter.modules[site.key] for site in adapter.sites.values()}
        places = [[(index, role) for role in self.roles] for index in range(len(blocks))]
        if any(place not in found for layer in places for place in layer):
            raise UserError("method.target_modules: milora needs the same roles in every layer")
        parts = [[found[place] for place in layer] for layer in places]
        names = list(self.config.activation)
        if len(blocks) % len(names):
            raise UserError(
                f"method.activation: {len(names)} names cannot share {len(blocks)} layers equally (allowed: 1 to "
                f"{len(blocks)} names, a divisor of it)"
            )
        width = model.config.get_text_config().hidden_size
        routers = [self._router(width, names[index * len(names) // len(blocks)]) for index in range(len(blocks))]
        adapter.routing = PromptRouting(model, blocks, parts, routers, self.config.k, GATES[self.config.gate])
        for index, router in enumerate(routers):
            adapter.train_also(router, f"{layers_path(model)}.{index}.prompt_router")
        if self.config.bilevel:
            adapter.deferred = {name for name in adapter.trained if ".prompt_router.activation." in name}
        return adapter

    def kind(self) -> Callable[..., LowRank]:
        if self.config.modules == "lora":
            return super().kind()
        from lowrank_cli.adapter.decomposed import Decomposed

        return Decomposed

    def _router(self, width: int, activation: str) -> Router:
        """The router of one layer of ``width`` features."""
        from lowrank_cli.adapter.router import ACTIVATIONS, POOLERS, Rational, Router

        orders = self.config.numerator_order, self.config.denominator_order
        function = Rational(*orders) if activation == "rational" else ACTIVATIONS[activation]
        return Router(width, len(self.roles), POOLERS[self.config.pooler](width), function)

    def extra_loss(self, adapter: Adapter) -> torch.Tensor:
        """λ_lb · Σ_l L_lb of the forward pass that just ran."""
        import torch

        from lowrank_cli.adapter.router import load_balance

        assert adapter.routing is not None
        terms = [load_balance(probabilities) for probabilities in adapter.routing.probabilities]
        return self.config.load_balance * torch.stack(terms).sum()

    def after_step(self, step: Step) -> None:
        """First-order bi-level step (section 3.4): the activations' coefficients follow the dev loss.

        Cost: one forward and backward pass of a dev batch for each training step; none with ``k`` = 1 and scaled
        gates, which are constant.
        """
        import torch

        if not self.config.bilevel or (self.config.k == 1 and self.config.gate == "scaled"):
            return
        optimizer = self._adam(step.adapter)
        coefficients = optimizer.param_groups[0]["params"]
        gradients = torch.autograd.grad(step.dev_loss(), coefficients)
        for parameter, gradient in zip(coefficients, gradients, strict=True):
            parameter.grad = step.average(gradient)
        optimizer.step()
        optimizer.zero_grad()

    def _adam(self, adapter: Adapter) -> torch.optim.Optimizer:
        import torch

        if self._optimizer is None:
            coefficients = [adapter.trained[name] for name in sorted(adapter.deferred)]
            self._optimizer = torch.optim.AdamW(coefficients, lr=self.config.activation_learning_rate, weight_decay=0.0)
        return self._optimizer

    def state(self) -> dict[str, torch.Tensor]:
        """The second optimizer's moments."""
        from lowrank_cli.adapter.state import moments

        return moments(self._optimizer) if self._optimizer else {}

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None:
        """Continue the second optimizer where :meth:`state` left it."""
        from lowrank_cli.adapter.state import load_moments

        if state:
            load_moments(self._adam(adapter), state, "the router's optimizer")

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Activated parameters for a prompt, on average, and the share of prompts that chose each role, by layer."""
        routing = adapter.routing
        assert routing is not None
        usage = add_up(routing.usage.to(adapter.model.device, copy=True)).cpu()
        routing.usage.zero_()
        prompts = int(usage[0].sum()) // routing.k
        if prompts == 0:
            return {}, []
        shares = usage / prompts  # (L, N)
        idle = sum(
            (1 - float(shares[layer, column])) * sum(parameter.numel() for parameter in part.trained().values())
            for layer, parts in enumerate(routing.parts)
            for column, part in enumerate(parts)
        )
        figure = {
            "file": "activated_modules.png",
            "kind": "heatmap",
            "title": f"Share of prompts that activate a module (k = {routing.k})",
            "rows": [f"layer {index}" for index in range(len(shares))],
            "columns": self.roles,
            "values": shares.tolist(),
            "label": "share of prompts",
            "scale": (0, 1),
        }
        return {"activated_parameters": adapter.count() - idle}, [figure]
