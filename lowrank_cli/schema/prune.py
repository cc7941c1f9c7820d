"""``lrk prune``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_range
from lowrank_cli.schema.evaluate import PredictConfig
from lowrank_cli.schema.run import RunConfig
from lowrank_cli.schema.score import ScoreConfig


@dataclass
class PruneConfig:
    """Which of the lowest go: ranks (one of ``drop`` and ``budget``), or whole modules (``keep``, ``keep_total``)."""

    drop: Optional[int] = MISSING  #: ranks to take out
    budget: Optional[int] = MISSING  #: ranks to keep, over the whole model
    #: layers are treated alike, instead of the model as one: as many ranks go from each; ``keep`` modules stay in each,
    #: and ``keep_total`` leaves none empty. null is false for ranks and true for modules
    per_layer: Optional[bool] = MISSING
    keep: Optional[int] = None  #: modules to keep of each layer; without ``per_layer`` as many times the layers
    keep_total: Optional[int] = None  #: modules to keep, over the whole model
    same_roles: bool = False  #: the same roles in every layer: those with the highest sums

    @property
    def modules(self) -> bool:
        """Whether whole modules go, and what is left is a setting."""
        return self.keep is not None or self.keep_total is not None

    def validate(self) -> None:
        amounts = ("drop", "budget", "keep", "keep_total")
        given = [key for key in amounts if getattr(self, key) is not None]
        if len(given) > 1:
            asked = " and ".join(f"prune.{key}={getattr(self, key)}" for key in given)
            raise UserError(f"prune: {asked} are given, and only one can be (prune.{given[0]}=null takes one back)")
        if not given:
            raise UserError(
                "prune: give one of prune.drop=N (ranks to take out), prune.budget=N (ranks to keep), "
                "prune.keep=N (modules to keep of each layer) and prune.keep_total=N (modules to keep in all)"
            )
        require_range(f"prune.{given[0]}", getattr(self, given[0]), 1)
        if self.keep is not None and self.per_layer is not False:
            require_range("prune.keep", self.keep, 1, 6)  # of Q K V O G U D
        if self.same_roles and self.keep is None:
            raise UserError("prune.same_roles: goes with prune.keep=N (roles to keep of each layer) and with no other")
        if self.same_roles and self.per_layer is False:
            raise UserError("prune.same_roles: true keeps roles in each layer, so prune.per_layer=false contradicts it")


@dataclass
class PruneRun(RunConfig):
    """``lrk prune``."""

    prune: PruneConfig = field(default_factory=PruneConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)  #: used where ``run`` is not a scoring
    evaluate: PredictConfig = field(default_factory=PredictConfig)
    run: Optional[str] = MISSING  #: folder of a scoring, or of a run with an adapter; null takes the newest of them
    test: bool = True  #: whether to measure the test split at the end, after the dev split

    @property
    def level(self) -> str:
        return "module" if self.prune.modules else "rank"

    def validate(self) -> None:
        self.prune.validate()
        self.score.validate()
        if self.score.level not in (None, self.level):
            raise UserError(f"score.level: '{self.score.level}', but this takes {self.level}s out; leave it null")
        if self.score.kind_of(self.level) == "mixed" and self.prune.same_roles:
            raise UserError(
                "score.kind: 'mixed' needs a cut between modules, but prune.same_roles adds their scores up over "
                "layers (allowed: ablation, kl, taylor, magnitude, random, auto)"
            )
