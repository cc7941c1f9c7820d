"""MiLoRA: every LoRA module is an expert, routed once per prompt.

Zhang et al., "MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning",
Findings of EMNLP 2024, arXiv 2410.18035, section 3. The router of layer l reads the prompt's hidden states only:

    p_l = softmax(Ra(z_l) W_r),   z_l = (pool(H_l) − mean) / deviation,   each token of H_l over its root mean square
    keep the k largest;   gate of a kept module = k · p / Σ_kept p
    loss = cross-entropy + load_balance · Σ_l N · Σ_i f_i p̂_i

with Ra a learnable rational function that starts as GeLU. MiDoRA is the same with DoRA's modules (``modules: dora``).

Reconstruction: the paper routes by pool(H_l) (``standardize: false``). On real decoders that chooses the same modules
for every prompt, with gates of k and 0, so it is standardised with the mean and deviation of some training prompts,
taken before the first step, saved with the adapter and then fixed. The paper does not say how the kept probabilities
enter the module's output. With ``gate: scaled`` they scale it, as above, so gradients reach the router, and a uniform
router with k = N is exactly LoRA. With ``straight_through`` kept modules are not scaled, and their probabilities get
the gradients of the gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range
from lowrank_cli.methods.lora import LoRA, LoRAConfig
from lowrank_cli.methods.protocol import Average, same

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
    from lowrank_cli.adapter.low_rank import LowRank
    from lowrank_cli.adapter.routing.choice_stats import Choices
    from lowrank_cli.adapter.routing.router import Router
    from lowrank_cli.adapter.target_sites import Site
    from lowrank_cli.methods.protocol import Start, Step

POOLERS = ("self_attention", "average", "max", "last_token")
ACTIVATIONS = ("rational", "gelu", "relu")
ROLES = "QKVOGUD"  #: each is one module of a layer
PROMPTS = 48  #: training prompts from which the routers' statistics are taken
FEW = 8  #: prompts below which equal routing of all is no problem


@dataclass
class MiLoRAConfig(LoRAConfig):
    """Low-rank modules, a router for each layer, and how the routers are trained.

    Keys with a default here were added later: it is the value for older adapters.
    """

    made_with: ClassVar[tuple[str, ...]] = (*LoRAConfig.made_with, "standardize")
    modules: str = MISSING  #: ``lora`` or ``dora`` (MiDoRA)
    k: int = MISSING  #: modules active in each layer for a prompt; 1 to the number of target roles
    gate: str = MISSING  #: ``scaled`` (with k = 1 only the load balance trains the router) or ``straight_through``
    #: route by features standardised over training prompts, or, false, by hidden states as they are (as published)
    standardize: bool = False
    pooler: str = MISSING  #: prompt tokens to one vector: ``self_attention``, ``average``, ``max`` or ``last_token``
    #: ``rational`` (learned), ``gelu`` or ``relu``; several names go to equal shares of the layers, first to last
    activation: list[str] = MISSING
    numerator_order: int = MISSING  #: m of ``rational``, whose coefficients are a_0 … a_m; 3 to 8
    denominator_order: int = MISSING  #: n of ``rational``, whose coefficients are b_1 … b_n; 2 to m − 1
    load_balance: float = MISSING  #: λ_lb, weight of the load-balance loss
    router_learning_rate: Optional[float] = None  #: peak, of the routers; null is ``train.learning_rate``
    soft_start: float = 0.0  #: share of the steps, at the start, that train every module of a layer; 0 to 1
    bilevel: bool = MISSING  #: step the activations' coefficients on dev batches, everything else on train batches
    bilevel_every: int = 1  #: training steps for each step on dev, when ``bilevel``; the paper's is 1
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
        require_range("method.soft_start", self.soft_start, 0, 1)
        require_range("method.bilevel_every", self.bilevel_every, 1)
        if self.router_learning_rate is not None:
            require_range("method.router_learning_rate", self.router_learning_rate, 0)
        require_range("method.activation_learning_rate", self.activation_learning_rate, 0)

    def check_k(self, modules: int) -> None:
        """Raise UserError unless ``k`` of the ``modules`` in a layer can be active."""
        if not 1 <= self.k <= modules:
            raise UserError(
                f"method.k: {self.k} is out of range (allowed: 1 to {modules}): it is how many modules of a layer are "
                f"active, and method.target_modules=[{','.join(self.target_modules)}] has {modules}; set method.k"
            )


class MiLoRA(LoRA):
    """LoRA (or DoRA) whose modules are chosen for each prompt by one router per layer."""

    Config = MiLoRAConfig
    config: MiLoRAConfig
    unmergeable = "its modules are chosen prompt by prompt"
    unprunable = "a module serves the prompts that its router sends to it, and no others"
    #: On LLaMA-2 7B with k = 3 (the paper's decoding-speed table).
    published_speed = {("moelora", 1): 1.217, ("dora", 1): 1.197, ("moelora", 3): 1.18, ("dora", 3): 1.13}

    def __init__(self, config: MiLoRAConfig):
        super().__init__(config)
        self._optimizer: torch.optim.Optimizer | None = None
        self._warming = config.soft_start > 0  # whether the next step trains every module

    def needs_prompt(self) -> str:
        return "chooses modules by the tokens of a prompt"

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """As LoRA's, the same roles in every layer. Raises UserError also for linears without a role."""
        from lowrank_cli.adapter.target_sites import layers

        sites = super().sites(model)
        strangers = [site.path for site in sites if site.layer is None]
        if strangers:
            raise UserError(f"method.target_modules: '{strangers[0]}' has no role in a layer; milora routes roles")
        roles, depth, names = {site.role for site in sites}, len(layers(model)), self.config.activation
        self.config.check_k(len(roles))
        if len({(site.layer, site.role) for site in sites}) < depth * len(roles):
            raise UserError("method.target_modules: milora needs the same roles in every layer")
        if depth % len(names):
            raise UserError(
                f"method.activation: {len(names)} names cannot share {depth} layers equally (allowed: 1 to {depth} "
                f"names, a divisor of it)"
            )
        return sites

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """Add LoRA's modules and a router for each layer."""
        from lowrank_cli.adapter.routing.prompt_routing import PromptRouting
        from lowrank_cli.adapter.routing.router import GATES
        from lowrank_cli.adapter.target_sites import layers, layers_path

        adapter, blocks, names = super().adapt(model), layers(model), list(self.config.activation)
        self.roles = list(dict.fromkeys(str(site.role) for site in adapter.sites.values()))
        by_role = {(site.layer, site.role): adapter.modules[site.key] for site in adapter.sites.values()}
        modules = [[by_role[index, role] for role in self.roles] for index in range(len(blocks))]
        width = model.config.get_text_config().hidden_size
        routers = [self._router(width, names[index * len(names) // len(blocks)]) for index in range(len(blocks))]
        adapter.routing = PromptRouting(model, blocks, modules, routers, self.config.k, GATES[self.config.gate])
        adapter.routing.warming = self._warming
        for index, router in enumerate(routers):
            name = f"{layers_path(model)}.{index}.prompt_router"
            adapter.train_also(router, name)
            adapter.keep_buffers(router, name)
        if self.config.bilevel:
            adapter.deferred = {name for name in adapter.trained if ".prompt_router.activation." in name}
        return adapter

    def kind(self) -> Callable[..., LowRank]:
        if self.config.modules == "lora":
            return super().kind()
        from lowrank_cli.adapter.kinds.dora import Decomposed

        return Decomposed

    def _router(self, width: int, activation: str) -> Router:
        """The router of one layer of ``width`` features."""
        from lowrank_cli.adapter.routing.router import ACTIVATIONS, POOLERS, Rational, Router

        orders = self.config.numerator_order, self.config.denominator_order
        function = Rational(*orders) if activation == "rational" else ACTIVATIONS[activation]
        pooler = POOLERS[self.config.pooler](width)
        return Router(width, len(self.roles), pooler, function, standardized=self.config.standardize)

    def prepare(self, start: Start) -> None:
        """Take the routers' statistics from training prompts, and report how these are routed."""
        import torch

        from lowrank_cli.adapter.routing.choice_stats import Choices
        from lowrank_cli.adapter.routing.router import EPSILON

        routing = start.adapter.routing
        assert routing is not None
        with routing.pooling() as passes:
            start.read(PROMPTS)
        pooled = torch.stack([torch.cat(layer) for layer in passes])  # (L, B, D)
        if self.config.standardize:
            moments = torch.stack([pooled.mean(dim=1), pooled.std(dim=1, correction=0)])  # (2, L, D)
            if moments[1].max() <= EPSILON:
                raise UserError(
                    f"method.standardize: all training prompts that the routers read ({pooled.shape[1]}) are alike; "
                    f"give different ones, or set method.standardize=false"
                )
            for router, mean, deviation in zip(routing.routers, *start.average(moments), strict=True):
                router.standardize(mean, deviation)
        choices = Choices(len(pooled), len(self.roles), routing.k)
        for layer, (router, rows) in enumerate(zip(routing.routers, pooled, strict=True)):
            choices.add(layer, router.choose(rows))
        start.log({f"routing/{name}": values for name, values in choices.by_layer().items()})
        if diagnosis := self.diagnosis(_metrics(choices)):
            start.say(f"before the first step, {choices.prompts} training prompts: {diagnosis}")

    def learning_rates(self, adapter: Adapter, peak: float) -> dict[str, float]:
        """The routers' learning rate, if set, besides those of LoRA."""
        rates, rate = super().learning_rates(adapter, peak), self.config.router_learning_rate
        if rate is None:
            return rates
        return rates | {
            name: rate for name in adapter.trained if ".prompt_router." in name and name not in adapter.deferred
        }

    def extra_loss(self, adapter: Adapter, average: Average = same) -> torch.Tensor:
        """λ_lb · Σ_l L_lb of the last forward pass."""
        from lowrank_cli.adapter.routing.router import load_balance

        assert adapter.routing is not None
        return self.config.load_balance * load_balance(adapter.routing.probabilities, average)

    def after_step(self, step: Step) -> None:
        """End the soft start when it is over, and step on dev batches when due."""
        assert step.adapter.routing is not None
        step.adapter.routing.warming = self._warming = step.number < self.config.soft_start * step.total
        if self.dev_every and step.number % self.dev_every == 0:
            self.dev_step(step)

    @property
    def dev_every(self) -> int:
        """Training steps for each :meth:`dev_step`; 0 if not bilevel, or if gates are constant (k = 1, scaled)."""
        idle = not self.config.bilevel or (self.config.k == 1 and self.config.gate == "scaled")
        return 0 if idle else self.config.bilevel_every

    def dev_use(self) -> str:
        """Used by :meth:`dev_step`."""
        return "steps its activations on dev batches (bilevel=False does without)" if self.dev_every else ""

    def dev_step(self, step: Step) -> None:
        """First-order bi-level step (section 3.4): the activations' coefficients follow the dev loss.

        Cost: a forward pass of a dev batch, and a backward pass that needs no gradients of the modules.
        """
        import torch

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
        """The second optimizer's state, and whether the soft start is on."""
        import torch

        from lowrank_cli.adapter.files.optimizer_state import moments

        optimizer_state = moments(self._optimizer) if self._optimizer else {}
        return optimizer_state | ({"warming": torch.tensor(self._warming)} if self.config.soft_start else {})

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`state`."""
        from lowrank_cli.adapter.files.optimizer_state import load_moments

        assert adapter.routing is not None
        if "warming" in state:
            adapter.routing.warming = self._warming = bool(state["warming"])
        if optimizer_state := {name: tensor for name, tensor in state.items() if name != "warming"}:
            load_moments(self._adam(adapter), optimizer_state, "the router's optimizer")

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Mean activated parameters of a prompt, how varied routing is, and heat maps by layer.

        ``routing/largest_gate``, ``routing/distinct_sets`` (of modules) and ``routing/set_entropy`` (of these sets over
        the prompts, in bits) are means over layers; ``routing/same_layers``, ``routing/saturated_layers`` and
        ``routing/tied_layers`` count the layers that :meth:`diagnosis` reports.
        """
        routing = adapter.routing
        assert routing is not None
        choices = routing.choices
        for counts in (choices.sets, choices.sums):
            counts.copy_(add_up(counts.to(adapter.model.device, copy=True)))
        if choices.prompts == 0:
            return {}, []
        shares, by_layer, metrics = choices.shares(), choices.by_layer(), _metrics(choices)
        choices.clear()
        idle = sum(
            (1 - float(shares[layer, column])) * sum(parameter.numel() for parameter in module.trained().values())
            for layer, modules in enumerate(routing.modules)
            for column, module in enumerate(modules)
        )
        activated = {
            "file": "activated_modules.png",
            "kind": "heatmap",
            "title": f"Share of prompts that activate a module (k = {routing.k})",
            "rows": [f"layer {index}" for index in range(len(shares))],
            "columns": self.roles,
            "values": shares.tolist(),
            "label": "share of prompts",
            "scale": (0, 1),
        }
        sets = {
            "file": "sets_of_modules.png",
            "kind": "lines",
            "title": "How differently prompts are routed, by layer",
            "rows": ["distinct sets of modules", "their entropy, bits", "largest gate"],
            "columns": list(range(len(shares))),
            "values": [by_layer[key] for key in ("distinct_sets", "set_entropy", "largest_gate")],
            "label": "over the prompts",
            "column_label": "layer",
        }
        return {"activated_parameters": adapter.count() - idle} | metrics, [activated, sets]

    def diagnosis(self, observed: Mapping[str, float]) -> str | None:
        """Layers with uniform, saturated or tied routing, in one line."""
        problems = {
            "same_layers": "the same modules for every prompt",
            "saturated_layers": "one module takes over 90 % of the probability for most prompts",
            "tied_layers": "the last module that is kept and the first that is not are tied for most prompts",
        }
        lines = [
            f"{what} in {observed[f'routing/{name}']} layer{'s' * (observed[f'routing/{name}'] > 1)}"
            for name, what in problems.items()
            if observed.get(f"routing/{name}")
        ]
        if not lines:
            return None
        hint = "" if self.config.standardize else "; try method.standardize=true"
        return f"routing: {'; '.join(lines)}{hint}"


def _metrics(choices: Choices) -> dict[str, float]:
    """Metrics of the whole model. If all modules are kept, equal routing is no problem and nothing ties."""
    by_layer, routed = choices.by_layer(), choices.k < choices.modules
    means = {name: fmean(by_layer[name]) for name in ("largest_gate", "distinct_sets", "set_entropy")}
    alike = sum(count == 1 for count in by_layer["distinct_sets"]) if routed and choices.prompts >= FEW else 0
    most = {name: sum(share > 0.5 for share in by_layer[name]) for name in ("saturated", "tied")}
    layers = {"same": alike, **most}
    return {f"routing/{name}": value for name, value in means.items()} | {
        f"routing/{name}_layers": count for name, count in layers.items()
    }
