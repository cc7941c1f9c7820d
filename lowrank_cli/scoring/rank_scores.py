"""Scores of ranks by kind; higher is more important."""

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
    """Scores of one kind."""

    kind: str
    values: dict[str, list[float]]  #: by module, the score of each rank, or one score of the module
    #: what the values were computed from, by name, in the same layout
    components: Mapping[str, Mapping[str, Sequence[float | None]]] = field(default_factory=dict)
    whole: float | None = None  #: S with the whole adapter, if measured
    bare: float | None = None  #: S without it, if measured
    level: str = "rank"  #: ``rank`` or ``module``
    reason: str = ""  #: why ``auto`` chose this kind, if it did

    @property
    def worth(self) -> dict[str, list[float]]:
        """The values minus the baseline, as shown and saved."""
        return {key: [value - self.baseline for value in row] for key, row in self.values.items()}

    @property
    def baseline(self) -> float:
        """The score of a rank without effect: S(M_0) for ``ab``, else 0."""
        return self.bare if self.kind == "ab" and self.bare is not None else 0.0


def score(kind: str, adapter: Adapter, probe: Probe, cut: Cut | None = None) -> Scores:
    """Scores of all ranks.

    ``ab`` is IS(i) = S(M) − S(M∖i) + S(M_i); ``taylor`` approximates IS(i) − S(M_0); ``mixed`` is ``taylor``, but exact
    for the ranks near ``cut``, which no other kind needs.
    """
    require_choice("score.kind", kind, SCORE_KINDS)
    require_ranks(adapter)
    if kind == "ab":
        return _ab(adapter, probe)
    if kind in ("taylor", "mixed"):
        slope_at_1, slope_at_0 = (_plain(slopes) for slopes in gradients.taylor(adapter, probe))
        values = {key: [a + b for a, b in zip(row, slope_at_0[key], strict=True)] for key, row in slope_at_1.items()}
        taylor = Scores("taylor", values, {"slope_at_1": slope_at_1, "slope_at_0": slope_at_0})
        return refined(taylor, adapter, probe, cut) if kind == "mixed" else taylor
    if kind == "magnitude":
        return Scores(kind, _plain(gradients.magnitude(adapter)))
    return Scores(kind, _plain({"sensitivity": gradients.sensitivity, "dnas": gradients.dnas}[kind](adapter, probe)))


def require_ranks(adapter: Adapter) -> None:
    """Raise UserError if the adapter cannot be scored and pruned."""
    if adapter.routing is not None or not adapter.modules or not all(p.rank_axes for p in adapter.modules.values()):
        raise UserError(
            "run: its adapter has no low-rank modules whose ranks add up and serve every prompt (as LoRA's do)"
        )


def refined(taylor: Scores, adapter: Adapter, probe: Probe, cut: Cut | None) -> Scores:
    """``mixed``: ``taylor`` scores, replaced by [S(M) − S(M∖i)] + [S(M_i) − S(M_0)] near ``cut``."""
    assert cut is not None, "mixed needs a cut"
    near, whole = cut.candidates(taylor.values), taylor.level == "module"
    indices = [(key, i) for key, row in taylor.values.items() for i in range(len(row)) if (key, i) in near]
    units = [(key, None if whole else i) for key, i in indices]
    ablations = ablate(adapter, probe, units)
    exact = {
        index: ablations.whole - ablations.without[unit] + ablations.alone[unit] - ablations.bare
        for index, unit in zip(indices, units, strict=True)
    }
    measured = {key: [exact.get((key, i)) for i in range(len(row))] for key, row in taylor.values.items()}
    components = {**taylor.components, "exact": measured}
    return Scores("mixed", cut.joined(taylor.values, exact), components, ablations.whole, ablations.bare, taylor.level)


def rows_to_run(kind: str, adapter: Adapter, probe: Probe, cut: Cut | None = None) -> int:
    """The number of rows that ``probe.tick`` will count."""
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
    ablations = ablate(adapter, probe, ranks_of(adapter))
    without, alone = (
        {key: [by_unit[key, rank] for rank in range(module.rank)] for key, module in adapter.modules.items()}
        for by_unit in (ablations.without, ablations.alone)
    )
    whole, bare = ablations.whole, ablations.bare
    values = {key: [whole - a + b for a, b in zip(row, alone[key], strict=True)] for key, row in without.items()}
    return Scores("ab", values, {"without": without, "alone": alone}, whole, bare)


def _plain(values: dict) -> dict[str, list[float]]:
    return {key: value.double().tolist() for key, value in values.items()}
