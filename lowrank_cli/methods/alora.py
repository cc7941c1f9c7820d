"""ALoRA: the ranks that do not help are pruned, and their budget goes to the modules that lost none.

Liu et al., "ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models", NAACL 2024,
arXiv 2403.16187, section 3. Every module starts with the same rank, so the budget holds from the first step. After
K1 epochs, and then every K2 epochs, up to N_A times:

    score every rank on a fixed dev batch:  IS(i) = S(M) − S(M∖i) + S(M_i)      (see lowrank_cli/scoring/ablation.py)
    prune the n_A lowest;  hand n_A new ranks, as evenly as possible, to the modules that lost none

A new rank is Gaussian in A and zero in B, so it changes nothing when it is inserted. If every module lost a rank, none
is added, and the final budget is smaller. The scale alpha / (initial rank) of a module never changes.

Reconstructions: n_A new ranks that do not divide evenly go to the modules of the highest mean importance (before the
pruning); a module that has lost all its ranks leaves the model for good; no module grows beyond its matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range
from lowrank_cli.methods.lora import LoRA, LoRAConfig
from lowrank_cli.schema import SCORE_KINDS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.core import Adapter
    from lowrank_cli.methods.protocol import Step


@dataclass
class ALoRAConfig(LoRAConfig):
    """LoRA modules of equal rank at the start, and when and how their ranks move."""

    score: str = (
        MISSING  #: ``ab`` (the paper's), its alternatives ``dnas`` and ``sensitivity``, ``taylor``, ``magnitude``
    )
    first_epochs: float = MISSING  #: K1, epochs before the first round
    round_epochs: float = MISSING  #: K2, epochs between two rounds
    rounds: int = MISSING  #: N_A, at most so many
    moved: Optional[int] = MISSING  #: n_A, ranks pruned in a round; null is the number of modules at the start
    dev_batch: int = MISSING  #: dev examples that ranks are scored on
    tokens: int = MISSING  #: of one scoring pass, at most: bounds memory

    def validate(self) -> None:
        super().validate()
        require_choice("method.score", self.score, SCORE_KINDS)
        require_range("method.first_epochs", self.first_epochs, 0)
        require_range("method.round_epochs", self.round_epochs, 0)
        for key in ("rounds", "dev_batch", "tokens"):
            require_range(f"method.{key}", getattr(self, key), 1)
        if self.moved is not None:
            require_range("method.moved", self.moved, 1)


class ALoRA(LoRA):
    """LoRA whose ranks move between modules while it trains."""

    Config = ALoRAConfig
    config: ALoRAConfig

    def __init__(self, config: ALoRAConfig):
        super().__init__(config)
        self._steps: list[int] = []  # at which a round was
        self._allocations: list[list[int]] = []  # the rank of every site, at the start and after each round

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """LoRA of equal ranks. Refuses to move as many ranks as there are."""
        adapter = super().adapt(model)
        self._moved = self.config.moved or len(adapter.modules)
        total = sum(adapter.ranks().values())
        if self._moved >= total:
            raise UserError(f"method.moved: {self._moved} ranks in a round leave none of {total} (raise method.rank)")
        self._note(adapter)
        return adapter

    def after_step(self, step: Step) -> None:
        """A round, where one is due. Raises UserError at the first step if training will end before any."""
        from lowrank_cli.adapter.ranks import resize
        from lowrank_cli.scoring.kinds import score

        first = max(1, math.ceil(self.config.first_epochs * step.epoch))
        every = max(1, math.ceil(self.config.round_epochs * step.epoch))
        if first > step.total:
            raise UserError(
                f"method.first_epochs: {self.config.first_epochs} epochs are {first} steps, but training has "
                f"{step.total}, so no rank would move; lower it, or raise train.max_steps or train.epochs"
            )
        if step.number < first or (step.number - first) % every or len(self._steps) >= self.config.rounds:
            return
        assert step.probe is not None
        adapter = step.adapter
        scores = score(self.config.score, adapter, step.probe(self.config.dev_batch, self.config.tokens))
        limits = {key: min(site.in_features, site.out_features) for key, site in adapter.sites.items()}
        plan = reallocated(scores.values, limits, min(self._moved, sum(adapter.ranks().values()) - 1))
        resize(adapter, plan, step.optimizer)
        self._steps.append(step.number)
        self._note(adapter)
        step.log(
            {"round": len(self._steps), "ranks": adapter.ranks(), "dev_batch_loss": scores.whole and -scores.whole}
        )

    def _note(self, adapter: Adapter) -> None:
        ranks = adapter.ranks()
        self._allocations.append([ranks.get(key, 0) for key in adapter.sites])

    def settled(self) -> bool:
        """Once ranks have moved: no adapter of equal ranks is kept as ALoRA's."""
        return bool(self._steps)

    def state(self) -> dict[str, torch.Tensor]:
        """The rounds so far; the ranks themselves are the adapter's."""
        import torch

        return {"steps": torch.tensor(self._steps), "allocations": torch.tensor(self._allocations)}

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None:
        """Continue behind the rounds of :meth:`state`."""
        self._steps = [int(step) for step in state["steps"].tolist()]
        self._allocations = state["allocations"].tolist()

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The allocation of ``adapter``, and after training every round's."""
        from lowrank_cli.scoring.figures import allocation, trajectory

        metrics: dict[str, float] = {"ranks": sum(adapter.ranks().values()), "modules": len(adapter.modules)}
        figures = [allocation(adapter)]
        if self._steps:
            metrics["reallocations"] = len(self._steps)
            names = ["start", *(f"step {step}" for step in self._steps)]
            rows = [dict(zip(adapter.sites, ranks, strict=True)) for ranks in self._allocations]
            figures.append(trajectory(adapter, list(zip(names, rows, strict=True))))
        return metrics, figures


def reallocated(
    scores: Mapping[str, Sequence[float]], limits: Mapping[str, int], moved: int
) -> dict[str, tuple[list[int], int]]:
    """The plan of one round, for :func:`lowrank_cli.adapter.ranks.resize`: ranks each module keeps, and new ones.

    ``scores`` of every live rank; ``limits`` are the largest ranks; ``moved`` is n_A. Equal scores are pruned in the
    order of modules and ranks.
    """
    order = sorted((score, at, rank) for at, row in enumerate(scores.values()) for rank, score in enumerate(row))
    pruned = {(at, rank) for _, at, rank in order[:moved]}
    keep = {
        key: [rank for rank in range(len(row)) if (at, rank) not in pruned]
        for at, (key, row) in enumerate(scores.items())
    }
    mean = {key: sum(row) / len(row) for key, row in scores.items()}
    takers = sorted((key for key, row in scores.items() if len(keep[key]) == len(row)), key=lambda key: -mean[key])
    fresh = dict.fromkeys(scores, 0)
    for _ in range(moved):
        room = [key for key in takers if len(keep[key]) + fresh[key] < limits[key]]
        if not room:
            break
        fresh[min(room, key=lambda key: fresh[key])] += 1  # of those that have got the fewest, the most important
    return {key: (keep[key], fresh[key]) for key in scores}
