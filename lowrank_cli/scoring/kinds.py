"""Every kind of score under one name: a number for each live rank of an adapter, the higher the more it is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.errors import UserError, require_choice
from lowrank_cli.schema import SCORE_KINDS
from lowrank_cli.scoring import gradients
from lowrank_cli.scoring.ablation import ablate, ranks_of
from lowrank_cli.scoring.cut import Cut
from lowrank_cli.scoring.probe import Probe


@dataclass
class Scores:
    """``values[key][i]`` scores rank i of a module; ``parts`` are what the values were made of, where there are any.

    ``level`` says whether there is a value for each rank, or one for the whole module. ``whole`` and ``bare`` are S
    with the whole adapter and without it, for the kinds that measure them. ``reason`` is why ``auto`` took this kind,
    where it did.
    """

    kind: str
    values: dict[str, list[float]]
    parts: Mapping[str, Mapping[str, Sequence[float | None]]] = field(default_factory=dict)
    whole: float | None = None
    bare: float | None = None
    level: str = "rank"
    reason: str = ""

    @property
    def worth(self) -> dict[str, list[float]]:
        """The values from what one scores that does nothing: these are shown and saved."""
        return {key: [value - self.baseline for value in row] for key, row in self.values.items()}

    @property
    def baseline(self) -> float:
        """What a rank that does nothing scores: S(M_0) where that is part of every score, otherwise 0."""
        return self.bare if self.kind == "ab" and self.bare is not None else 0.0


def score(kind: str, adapter: Adapter, probe: Probe, cut: Cut | None = None) -> Scores:
    """Scores of all live ranks. ``ab`` is IS(i) = S(M) − S(M∖i) + S(M_i); ``taylor`` approximates it up to S(M_0).

    ``mixed`` is ``taylor``, but IS(i) − S(M_0) for the ranks near ``cut``, which no other kind looks at.
    """
    require_choice("score.kind", kind, SCORE_KINDS)
    require_ranks(adapter)
    if kind == "ab":
        return _ab(adapter, probe)
    if kind in ("taylor", "mixed"):
        there, away = (_plain(found) for found in gradients.taylor(adapter, probe))
        values = {key: [a + b for a, b in zip(row, away[key], strict=True)] for key, row in there.items()}
        cheap = Scores("taylor", values, {"slope_at_1": there, "slope_at_0": away})
        return refined(cheap, adapter, probe, cut) if kind == "mixed" else cheap
    if kind == "magnitude":
        return Scores(kind, _plain(gradients.magnitude(adapter)))
    return Scores(kind, _plain({"sensitivity": gradients.sensitivity, "dnas": gradients.dnas}[kind](adapter, probe)))


def require_ranks(adapter: Adapter) -> None:
    """Raise UserError for an adapter that can be neither scored nor pruned."""
    if adapter.routing is not None or not adapter.modules or not all(p.rank_axes for p in adapter.modules.values()):
        raise UserError(
            "run: its adapter has no low-rank modules whose ranks add up and serve every prompt (as LoRA's do)"
        )


def refined(cheap: Scores, adapter: Adapter, probe: Probe, cut: Cut | None) -> Scores:
    """``mixed``: the scores of ``taylor``, with the ablation's [S(M) − S(M∖i)] + [S(M_i) − S(M_0)] near ``cut``."""
    assert cut is not None, "mixed needs to know where the cut is"
    near, whole = cut.candidates(cheap.values), cheap.level == "module"
    places = [(key, index) for key, row in cheap.values.items() for index in range(len(row)) if (key, index) in near]
    units = [(key, None if whole else index) for key, index in places]
    found = ablate(adapter, probe, units)
    exact = {
        place: found.whole - found.without[unit] + found.alone[unit] - found.bare
        for place, unit in zip(places, units, strict=True)
    }
    measured = {key: [exact.get((key, index)) for index in range(len(row))] for key, row in cheap.values.items()}
    parts = {**cheap.parts, "exact": measured}
    return Scores("mixed", cut.joined(cheap.values, exact), parts, found.whole, found.bare, cheap.level)


def rows_to_run(kind: str, adapter: Adapter, probe: Probe, cut: Cut | None = None) -> int:
    """What ``probe.tick`` will count up to."""
    passes = {
        "ab": 2 * sum(adapter.ranks().values()),
        "mixed": 2 + 2 * (cut.size(adapter.ranks()) if cut else 0),
        "taylor": 2,
        "sensitivity": 1,
        "dnas": gradients.GATE_PASSES,
        "magnitude": 0,
    }
    return passes[kind] * probe.rows


def _ab(adapter: Adapter, probe: Probe) -> Scores:
    found = ablate(adapter, probe, ranks_of(adapter))
    without, alone = (
        {key: [of[key, rank] for rank in range(part.rank)] for key, part in adapter.modules.items()}
        for of in (found.without, found.alone)
    )
    values = {key: [found.whole - a + b for a, b in zip(row, alone[key], strict=True)] for key, row in without.items()}
    return Scores("ab", values, {"without": without, "alone": alone}, found.whole, found.bare)


def _plain(values: dict) -> dict[str, list[float]]:
    return {key: value.double().tolist() for key, value in values.items()}
