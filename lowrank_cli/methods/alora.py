"""ALoRA: ranks that do not help are pruned, and their budget goes to the modules that lost none.

Liu et al., "ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models", NAACL 2024,
arXiv 2403.16187, section 3. Every module starts with the same rank, so the budget holds from the first step. After
K1 epochs, and then every K2 epochs, up to N_A times:

    score every rank on a fixed dev batch:  IS(i) = S(M) − S(M∖i) + S(M_i)      (see lowrank_cli/scoring/ablation.py)
    prune the n_A lowest;  hand n_A new ranks, as evenly as possible, to the modules that lost none

A new rank is Gaussian in A and zero in B, so it changes nothing when it is inserted. If every module lost a rank, none
is added, and the final budget is smaller. The scale alpha / (initial rank) of a module never changes.

Reconstructions: new ranks that do not divide evenly go to the modules with the highest mean importance (before
pruning); a module that has lost all its ranks leaves the model for good; no module grows beyond its matrix; no round
comes before training. The paper says "at most" N_A rounds: here they end when more than the share ``settle`` of the n_A
lowest ranks are new from the round before. Those did not catch up in K2 epochs, and pruning them would return their
budget to the modules it was taken from, back and forth.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range
from lowrank_cli.methods.lora import LoRA, LoRAConfig
from lowrank_cli.schema import AUTO, SCORE_KINDS, require_window

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
    from lowrank_cli.methods.protocol import Step
    from lowrank_cli.scoring.rank_scores import Scores


@dataclass
class ALoRAConfig(LoRAConfig):
    """LoRA modules that start with equal ranks, and when and how ranks move."""

    #: ``ab`` (the paper's, exact), ``taylor`` (its approximation), ``mixed`` (exact near the cut), ``auto`` (the best
    #: of these whose scorings cost less than a tenth of training in all), ``dnas``, ``sensitivity`` or ``magnitude``
    score: str = MISSING
    #: of ``mixed``: share of the ranks that are scored exactly, those around the n_A-th lowest; above 0 to 1
    window: float = 0.1
    first_epochs: float = MISSING  #: K1, epochs before the first round
    round_epochs: float = MISSING  #: K2, epochs between two rounds
    rounds: int = MISSING  #: N_A, at most so many
    moved: Optional[int] = MISSING  #: n_A, ranks pruned in a round; null: as many as modules, at most half
    settle: float = (
        MISSING  #: share of new ranks among the n_A lowest above which ranks stop moving; 1 never stops them
    )
    dev_batch: int = MISSING  #: |B_val|, dev examples that ranks are scored on
    #: of one scoring pass, at most: bounds memory; about 1024 suits the caches of a CPU, a GPU is faster with more
    tokens: int = MISSING

    def validate(self) -> None:
        super().validate()
        require_choice("method.score", self.score, [*SCORE_KINDS, AUTO])
        require_window("method.window", self.window)
        require_range("method.first_epochs", self.first_epochs, 0)
        if not self.round_epochs > 0:
            raise UserError(f"method.round_epochs: {self.round_epochs} is out of range (allowed: above 0)")
        for key in ("rounds", "dev_batch", "tokens"):
            require_range(f"method.{key}", getattr(self, key), 1)
        if self.moved is not None:
            require_range("method.moved", self.moved, 1)
        require_range("method.settle", self.settle, 0, 1)


class ALoRA(LoRA):
    """LoRA whose ranks move between modules while it trains."""

    Config = ALoRAConfig
    config: ALoRAConfig

    def __init__(self, config: ALoRAConfig):
        super().__init__(config)
        self._steps: list[int] = []  # the step of each round
        self._allocations: list[list[int]] = []  # the rank of every site, initially and after each round
        self._new: dict[str, int] = {}  # by module, how many of its last ranks were added in the last round
        self._settled: int | None = None  # the step after which ranks no longer move
        self._seconds = 0.0  # time spent on scoring

    def dev_use(self) -> str:
        """Each round scores ranks."""
        return "scores ranks on dev batches"

    def needs_adam(self) -> str:
        """Ranks take theirs along."""
        return "moves ranks with their moments"

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """LoRA with equal ranks. Raises UserError if a round would move all of them."""
        adapter = super().adapt(model)
        self._check(adapter)
        self._keys = list(adapter.sites)
        return adapter

    def _check(self, adapter: Adapter) -> None:
        moved, total = self.config.moved or 1, sum(adapter.ranks().values())
        if moved >= total:
            raise UserError(f"method.moved: {moved} in a round leaves none of the {total} ranks that there are")

    def _ranks_to_move(self, adapter: Adapter) -> int:
        """n_A, from the ranks at the first round (a continued run may start with fewer); at least one rank stays."""
        ranks = [rank for rank in (self._allocations or [list(adapter.ranks().values())])[0] if rank]
        return min(self.config.moved or min(len(ranks), sum(ranks) // 2), sum(adapter.ranks().values()) - 1)

    def after_step(self, step: Step) -> None:
        """Run a round if one is due. Raises UserError at the first step if training ends before any round."""
        if step.number == 1:
            self._check(step.adapter)
        first = max(1, math.ceil(self.config.first_epochs * step.epoch))
        every = max(1, math.ceil(self.config.round_epochs * step.epoch))
        if first >= step.total:
            raise UserError(
                f"method.first_epochs: {self.config.first_epochs} epochs are {first} steps, but training has "
                f"{step.total}, so no rank would move; lower it, or raise train.max_steps or train.epochs"
            )
        due = step.number >= first and (step.number - first) % every == 0 and step.number < step.total
        movable = self._settled is None and sum(step.adapter.ranks().values()) > 1
        if due and len(self._steps) < self.config.rounds and movable:
            self._round(step, min(self.config.rounds, 1 + (step.total - 1 - first) // every))

    def _round(self, step: Step, rounds: int) -> None:
        """Score, prune and grow, or settle; ``rounds`` is the maximal number of rounds."""
        from lowrank_cli.adapter.ranks import resize
        from lowrank_cli.scoring import cost
        from lowrank_cli.scoring.cut import Cut
        from lowrank_cli.scoring.rank_scores import rows_to_run, score

        assert step.probe is not None
        adapter, began = step.adapter, time.monotonic()
        probe = step.probe(self.config.dev_batch, self.config.tokens)
        cut, kind = Cut(self.config.window, [(list(adapter.modules), self._ranks_to_move(adapter))]), self.config.score
        choice: dict[str, str] = {}
        if kind == AUTO:
            kind, reason = cost.choose(cost.costs(adapter, "rank", probe, cut), step.tokens, rounds)
            choice = {"score": kind, "reason": reason}
            step.say(reason)
        with step.watch(f"scoring ranks ({kind})", rows_to_run(kind, adapter, probe, cut)) as probe.tick:
            scores = score(kind, adapter, probe, cut)
        self._seconds += time.monotonic() - began
        name = f"step {step.number}/{step.total}: round {len(self._steps) + 1} of {rounds}"
        name += f" ({time.monotonic() - began:.1f} s)"
        limits = {key: min(site.in_features, site.out_features) for key, site in adapter.sites.items()}
        plan = reallocated(scores.values, limits, self._ranks_to_move(adapter))
        lowest, new = count_pruned(plan, adapter.ranks(), self._new)
        if new > self.config.settle * lowest:
            self._settled = step.number
            step.log({"settled": True, "lowest": lowest, "new_among_lowest": new, **choice})
            step.say(f"{name}: settled, for {new} of the {lowest} lowest ranks are new")
            return
        roles = {key: str(site.role or key) for key, site in adapter.sites.items()}
        step.say(f"{name}: {describe_round(plan, scores, roles)}")
        if not self._allocations:
            self._record_allocation(adapter)
        resize(adapter, plan, step.optimizer)
        self._new = {key: fresh for key, (_, fresh) in plan.items()}
        self._steps.append(step.number)
        self._record_allocation(adapter)
        loss = {} if scores.whole is None else {"dev_batch_loss": -scores.whole}  # before the round
        step.log({"round": len(self._steps), "ranks": adapter.ranks(), **loss, **choice})

    def _record_allocation(self, adapter: Adapter) -> None:
        ranks = adapter.ranks()
        self._allocations.append([ranks.get(key, 0) for key in adapter.sites])

    def unsettled(self) -> str | None:
        """Unsettled until ranks have moved: an adapter with equal ranks is plain LoRA."""
        return None if self._steps else "no rank has moved yet"

    def state(self) -> dict[str, torch.Tensor]:
        """The rounds so far; the ranks themselves are saved with the adapter."""
        import torch

        return {
            "steps": torch.tensor(self._steps),
            "allocations": torch.tensor(self._allocations),
            "new": torch.tensor([self._new.get(key, 0) for key in self._keys]),
            "settled": torch.tensor(self._settled or 0),
            "seconds": torch.tensor(self._seconds, dtype=torch.float64),
        }

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`state`."""
        self._steps = [int(step) for step in state["steps"].tolist()]
        self._allocations = state["allocations"].tolist()
        self._new = dict(zip(adapter.sites, state["new"].tolist(), strict=True))
        self._settled = int(state["settled"]) or None
        self._seconds = state["seconds"].item()

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The current allocation, and after training the allocation of every round."""
        from lowrank_cli.scoring.heatmaps import allocation, trajectory

        metrics: dict[str, float] = {"ranks": sum(adapter.ranks().values()), "modules": len(adapter.modules)}
        figures = [allocation(adapter)]
        if self._steps:
            metrics["reallocations"] = len(self._steps)
            metrics["train/scoring_seconds"] = self._seconds
            metrics |= {} if self._settled is None else {"settled_step": self._settled}
            names = ["start", *(f"step {step}" for step in self._steps)]
            rows = [dict(zip(adapter.sites, ranks, strict=True)) for ranks in self._allocations]
            figures.append(trajectory(adapter, list(zip(names, rows, strict=True))))
        return metrics, figures


def reallocated(
    scores: Mapping[str, Sequence[float]], limits: Mapping[str, int], moved: int
) -> dict[str, tuple[list[int], int]]:
    """The plan of one round, for :func:`lowrank_cli.adapter.ranks.resize`.

    Args:
        scores: of every live rank, by module. Ties are pruned in the order of modules and ranks.
        limits: the largest possible rank of each module.
        moved: n_A.
    """
    from lowrank_cli.adapter.ranks import all_but_lowest

    keep = all_but_lowest(scores, moved)
    mean = {key: sum(row) / len(row) for key, row in scores.items()}
    takers = sorted((key for key, row in scores.items() if len(keep[key]) == len(row)), key=lambda key: -mean[key])
    fresh = dict.fromkeys(scores, 0)
    for _ in range(moved):
        room = [key for key in takers if len(keep[key]) + fresh[key] < limits[key]]
        if not room:
            break
        fresh[min(room, key=lambda key: fresh[key])] += 1  # fewest new ranks first, then most important
    return {key: (keep[key], fresh[key]) for key in scores}


def count_pruned(
    plan: Mapping[str, tuple[list[int], int]], ranks: Mapping[str, int], new: Mapping[str, int]
) -> tuple[int, int]:
    """How many ranks ``plan`` prunes, and how many of them are among the last ``new`` ones of their module."""
    pruned = {key: set(range(ranks[key])) - set(keep) for key, (keep, _) in plan.items()}
    fresh = sum(rank >= ranks[key] - new.get(key, 0) for key, indices in pruned.items() for rank in indices)
    return sum(map(len, pruned.values())), fresh


def describe_round(plan: Mapping[str, tuple[list[int], int]], scores: Scores, roles: Mapping[str, str]) -> str:
    """Describe a round: ranks pruned and added by role, and their ranges of scores."""
    pruned_by_role: Counter[str] = Counter()
    added_by_role: Counter[str] = Counter()
    pruned, kept = [], []
    for key, (keep, fresh) in plan.items():
        row = [score - scores.baseline for score in scores.values[key]]
        kept += [row[rank] for rank in keep]
        pruned += [score for rank, score in enumerate(row) if rank not in keep]
        pruned_by_role[roles[key]] += len(row) - len(keep)
        added_by_role[roles[key]] += fresh

    def by_role(counts: Counter[str]) -> str:
        return ", ".join(f"{role} {count}" for role, count in counts.items() if count)

    return (
        f"{len(pruned)} of {len(pruned) + len(kept)} ranks pruned, {added_by_role.total()} added\n"
        f"  scores: pruned {min(pruned):.2g} to {max(pruned):.2g}, kept up to {max(kept):.2g}\n"
        f"  pruned: {by_role(pruned_by_role)}\n"
        f"  added: {by_role(added_by_role) or 'none, as every module lost a rank'}"
    )
