"""LeLoRA: a policy network repeatedly decides which components of each matrix are trained.

Zhou et al., ACL 2026, pp. 35255–35273. Reconstruction: from the abstract we know that a policy network generates a
strategy for each weight matrix from its characteristics "such as singular values and matrix norms", instead of
components set by hand (PiSSA: the principal ones; others: minor or random ones), and that reinforcement learning
updates model and policy iteratively. The rest was chosen here. A strategy is a window of the spectrum W = U S Vᵀ with
start p and width r; its components train as in PiSSA. Every ``phase`` steps of the first part of training:

    fold every update into its weight → compute spectra again → one network chooses all windows; the widths share the
    rank budget exactly → dev gradients → train → reward = progress of each matrix along them, as a share → clipped
    policy gradient over the last phases, which compares each matrix with itself

Then the policy's most likely windows stay. The control ``policy_learning_rate: 0`` ends the same way without learning,
with equal widths at the first place. p = 0 and p = k − r throughout are PiSSA and the minor components.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range
from lowrank_cli.methods.lora import LoRA, LoRAConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
    from lowrank_cli.adapter.low_rank import LowRank
    from lowrank_cli.adapter.target_sites import Site
    from lowrank_cli.methods.lelora.strategy import Strategies
    from lowrank_cli.methods.protocol import Step


@dataclass
class LeLoRAConfig(LoRAConfig):
    """LoRA's settings (``rank`` is the mean width, and rank × matrices the budget), and how windows are chosen."""

    policy: str = MISSING  #: ``learned``, ``random`` (the same switching, nothing learnt) or ``fixed`` (no switching)
    start: float = MISSING  #: window of ``fixed``, and of the first step: 0 principal components … 1 minor ones
    phase: int = MISSING  #: optimizer steps between choices
    explore: float = MISSING  #: share of training after which the windows stay, rounded down to whole phases
    places: int = MISSING  #: P, window starts to choose from, evenly spaced from principal to minor
    width_limit: int = MISSING  #: a window is at most this many times ``rank`` wide
    reward: str = MISSING  #: ``per_matrix`` (first-order shares of the dev loss's drop) or ``global`` (all of it)
    probe: int = MISSING  #: dev batches, the same in all phases, for the loss and its gradients
    refresh: float = MISSING  #: change of a large matrix, relative to its norm, after which it is decomposed again
    policy_learning_rate: float = MISSING  #: of the policy network (Adam)
    entropy: float = MISSING  #: weight of the entropy bonus

    def validate(self) -> None:
        super().validate()
        require_choice("method.policy", self.policy, ("learned", "random", "fixed"))
        require_choice("method.reward", self.reward, ("per_matrix", "global"))
        require_range("method.start", self.start, 0, 1)
        require_range("method.explore", self.explore, 0, 1)
        require_range("method.places", self.places, 2)
        for key in ("phase", "width_limit", "probe"):
            require_range(f"method.{key}", getattr(self, key), 1)
        for key in ("refresh", "policy_learning_rate", "entropy"):
            require_range(f"method.{key}", getattr(self, key), 0)


class LeLoRA(LoRA):
    """Trains a window of each target linear's spectrum; a policy moves the windows."""

    Config = LeLoRAConfig
    config: LeLoRAConfig
    unprunable = "its update is the trained components minus the initial ones, so no rank can be judged alone"

    def __init__(self, config: LeLoRAConfig):
        super().__init__(config)
        self.strategies: Strategies | None = None  # None if windows are fixed

    def rewrites(self) -> str:
        """A window's updates are folded into the weights when it moves."""
        policy = self.config.policy
        return "" if policy == "fixed" else f"folds updates into them with method.policy={policy} (allowed: fixed)"

    def dev_use(self) -> str:
        """Rewards, if windows move."""
        return "" if self.config.policy == "fixed" else "rewards its choices by the loss of dev batches"

    def needs_adam(self) -> str:
        """Ranks that stay in a moved window keep theirs."""
        return "" if self.config.policy == "fixed" else "moves windows with their moments"

    def kept_bytes(self, adapter: Adapter) -> int:
        """The spectra between two choices."""
        if self.strategies is None:
            return 0
        components = zip(self.strategies.reachable, adapter.sites.values(), strict=True)
        return sum(4 * len(index) * (site.in_features + site.out_features) for index, site in components)

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """As LoRA's, of which none may share its weight with the input embedding if windows move."""
        from lowrank_cli.adapter.image_input import token_embedding

        sites, embedding = super().sites(model), token_embedding(model)
        for site in sites:
            if self.config.policy != "fixed" and model.get_submodule(site.path).weight is embedding:
                raise UserError(f"method.target_modules: '{site.path}' shares its weight with the input embedding")
        return sites

    def kind(self) -> type[LowRank]:
        from lowrank_cli.adapter.kinds.svd_window import MovingWindow

        return MovingWindow

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """As LoRA, with all windows at ``start``."""
        from lowrank_cli.adapter.kinds.svd_window import MovingWindow, window
        from lowrank_cli.methods.lelora.strategy import Strategies

        config, adapter = self.config, super().adapt(model)
        for site in adapter.sites.values():
            module = adapter.modules[site.key]
            assert isinstance(module, MovingWindow)
            module.set_components(*window(adapter.linears[site.path].rows(site.span), config.start, config.rank))
        if config.policy == "fixed":
            return adapter
        self.strategies = Strategies(
            adapter,
            budget=config.rank * len(adapter.sites),
            limit=config.rank * config.width_limit,
            places=config.places,
            refresh=config.refresh,
            learns=config.policy == "learned",
            per_matrix=config.reward == "per_matrix",
            learning_rate=config.policy_learning_rate,
            entropy=config.entropy,
        )
        return adapter

    def _end(self, step: Step) -> int:
        """The step at which exploration ends: the end of the last whole phase."""
        return max(1, int(self.config.explore * step.total + 1e-6) // self.config.phase * self.config.phase)

    def after_step(self, step: Step) -> None:
        """Choose windows after the first step, every ``phase`` steps, and finally at the end of exploration."""
        number, end = step.number, self._end(step)
        if self.strategies is None or number > end:
            return
        if number == 1 and self.config.policy == "learned" and end < 2 * self.config.phase:
            step.say(
                f"lelora: no two phases of method.phase={self.config.phase} steps in the first "
                f"{self.config.explore:.0%} (method.explore) of {step.total} steps: the policy learns nothing"
            )
        if number == 1 or number % self.config.phase == 0 or number == end:
            losses = [partial(step.dev_loss, batch) for batch in range(1, self.config.probe + 1)]
            row = self.strategies.switch(
                number,
                number / step.total,
                losses,
                step.optimizer,
                last=number == end,
                average=step.average,
                agree=step.agree,
            )
            step.log({f"strategy/{name}": value for name, value in row.items() if name != "step"})

    def state(self) -> dict[str, torch.Tensor]:
        """See :meth:`Strategies.state`."""
        return self.strategies.state() if self.strategies else {}

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`state`."""
        if self.strategies:
            self.strategies.load_state(state)

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """After training: the cost of the strategies, and figures of windows, rewards and the policy."""
        strategies = self.strategies
        if strategies is None or not strategies.log:
            return {}, []
        metrics = {"strategy/choices": len(strategies.log["step"]), "strategy/seconds": strategies.seconds}
        return metrics, figures(strategies)


def figures(strategies: Strategies) -> list[dict[str, Any]]:
    """Figures of the windows over phases, the rewards, and the policy's preference by depth and role."""
    log: dict[str, Any] = {name: [value.tolist() for value in values] for name, values in strategies.log.items()}
    names = [
        site.path.rpartition(".")[2] if site.role is None else f"{site.layer} {site.role}" for site in strategies.sites
    ]
    entries = [
        {
            "file": "windows.png",
            "kind": "bubbles",
            "title": "Window of each matrix: place as colour, width as size",
            "rows": names,
            "panel_of": [str(site.role or "other") for site in strategies.sites],
            "panel_rows": [str(site.layer) for site in strategies.sites],
            "columns": log["step"],
            "values": [
                [starts[m] / max(1, size - widths[m]) for starts, widths in zip(log["starts"], log["widths"])]
                for m, size in enumerate(strategies.sizes)
            ],
            "sizes": [[widths[m] for widths in log["widths"]] for m in range(len(names))],
            "size_label": "width",
            "scale": (0, 1),
            "label": "place of the window (0 principal … 1 minor components)",
            "column_label": "step of the choice (the last one stays)",
        },
    ]
    phases = list(pairwise(zip(log["step"], log["dev_loss"])))
    if phases:
        falls = [(before - after) / (end - start) for (start, before), (end, after) in phases]
        entries.append(
            {
                "file": "rewards.png",
                "kind": "lines",
                "title": "How fast the dev loss fell in each phase",
                "rows": ["drop"],
                "columns": log["step"][1:],
                "values": [falls],
                "label": "drop of the dev loss per step",
                "column_label": "step at which the phase ended",
            }
        )
    if strategies.learns and len(phases) > 1 and all(site.role for site in strategies.sites):
        places, widths = strategies.preference()
        for file, what, values in (("place", "place of the window", places), ("width", "width", widths)):
            entries.append(_by_depth_and_role(strategies, f"preferred_{file}.png", what, values))
    return entries


def _by_depth_and_role(strategies: Strategies, file: str, what: str, values: list[Any]) -> dict[str, Any]:
    sites = strategies.sites
    roles = list(dict.fromkeys(site.role for site in sites))
    layers = sorted({site.layer for site in sites if site.layer is not None})
    table = {(site.layer, site.role): value for site, value in zip(sites, values)}
    return {
        "file": file,
        "kind": "heatmap",
        "title": f"The policy at the end: {what}",
        "rows": [f"layer {layer}" for layer in layers],
        "columns": roles,
        "values": [[table.get((layer, role)) for role in roles] for layer in layers],
        "label": what,
    }
