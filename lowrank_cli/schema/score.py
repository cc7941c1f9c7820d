"""``lrk score``, and the kinds of scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range
from lowrank_cli.schema.run import RunConfig

#: What a rank can be scored by, with what the number is; see :mod:`lowrank_cli.scoring.rank_scores`.
SCORE_KINDS = {
    "ab": "dev loss (nats) without the rank minus with all, plus that of the bare model minus with the rank alone",
    "mixed": "dev loss (nats) that the rank saves, exact as ab near the cut, and beyond estimated as taylor's",
    "taylor": "dev loss (nats) that the rank saves, as ab but estimated from gradients",
    "sensitivity": "|weight × gradient| times how much that varies (nats²), both smoothed over parts of the dev batch",
    "dnas": "how far a trained gate of the rank opened (above 0) or closed (below)",
    "magnitude": "norm of what the rank adds to its weight",
}
#: What a whole module can be scored by, likewise; see :mod:`lowrank_cli.scoring.module_scores`.
MODULE_KINDS = {
    "ablation": "dev loss (nats) without the module minus with all, plus that of the bare model minus with it alone",
    "mixed": "dev loss (nats) that the module saves, exact as ablation near the cut, and beyond estimated as taylor's",
    "kl": "divergence (nats) of the answers without the module from those with all",
    "taylor": "dev loss (nats) that the module saves, as ablation but estimated from gradients",
    "magnitude": "norm of the module's update relative to that of the frozen output",
    "random": "numbers drawn by the seed",
}
#: Kinds by ``score.level``, each with its default first.
KINDS = {"rank": SCORE_KINDS, "module": MODULE_KINDS}
#: As a kind: the best of the exact one, ``mixed`` and ``taylor`` that costs less than a tenth of training; see
#: :mod:`lowrank_cli.scoring.cost`.
AUTO = "auto"


def require_window(key: str, share: float) -> None:
    """Raise UserError unless ``share`` of the units can be scored exactly by ``mixed``."""
    if not 0 < share <= 1:
        raise UserError(f"{key}: {share} is out of range (allowed: above 0 to 1)")


@dataclass
class ScoreConfig:
    """How ranks or whole modules are scored, on dev examples."""

    level: Optional[str] = MISSING  #: ``rank`` or ``module``; null leaves it to what ``prune`` takes out
    #: by what they are scored: a kind of that level; null is its first; ``auto`` is the best of the exact one,
    #: ``mixed`` and ``taylor`` that costs less than a tenth of the training that made the adapter
    kind: Optional[str] = MISSING
    batch: int = MISSING  #: dev examples, drawn by the seed; all of them where there are fewer
    #: of one forward pass, at most: bounds memory; about 1024 suits the caches of a CPU, a GPU is faster with more
    tokens: int = MISSING
    #: of ``mixed``: share of the ranks or modules that are scored exactly, of a layer's where layers are treated alike,
    #: half of them on each side of the cut and two at least; above 0 to 1
    window: float = 0.1

    def validate(self) -> None:
        if self.level is not None:
            require_choice("score.level", self.level, KINDS)
        if self.kind is not None:
            require_choice("score.kind", self.kind, dict.fromkeys([*chain(*KINDS.values()), AUTO]))
        require_range("score.batch", self.batch, 1)
        require_range("score.tokens", self.tokens, 1)
        require_window("score.window", self.window)

    def kind_of(self, level: str) -> str:
        """The kind of score that ``level`` gets, or :data:`AUTO`. Raises UserError for a kind of the other level."""
        kind = self.kind or next(iter(KINDS[level]))
        if kind not in (*KINDS[level], AUTO):
            other = next(name for name in KINDS if name != level)
            raise UserError(
                f"score.kind: '{kind}' scores {other}s (allowed for {level}s: {', '.join([*KINDS[level], AUTO])}; "
                f"score.level={other} scores {other}s)"
            )
        return kind


@dataclass
class ScoreRun(RunConfig):
    """``lrk score``."""

    score: ScoreConfig = field(default_factory=ScoreConfig)
    run: Optional[str] = MISSING  #: as of ``lrk evaluate``

    @property
    def level(self) -> str:
        return self.score.level or "rank"

    def validate(self) -> None:
        self.score.validate()
        self.score.kind_of(self.level)
