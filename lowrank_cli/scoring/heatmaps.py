"""Heat maps of scores and ranks, roles × layers, as input of :mod:`lowrank_cli.report.plots`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.target_sites import ROLES
from lowrank_cli.scoring.rank_scores import Scores


def heat_map(adapter: Adapter, scores: Scores, kept: Collection[str] = ()) -> dict[str, Any]:
    """The score of each module, or the mean over its ranks, above the baseline. Modules in ``kept`` are outlined."""
    means = {key: sum(values) / len(values) for key, values in scores.worth.items()}
    what = "Score of each module" if scores.level == "module" else "Mean score of a module's ranks"
    return by_role(
        adapter,
        means,
        file="scores.png",
        title=f"{what} ({scores.kind}){f', {len(kept)} of {len(means)} kept' if kept else ''}",
        outlined=kept,
        label="IS − S(M₀)" if scores.kind == "ab" else scores.kind,
        in_units=True,
    )


def allocation(adapter: Adapter) -> dict[str, Any]:
    """The current rank of each module."""
    return by_role(
        adapter,
        {key: float(adapter.ranks().get(key, 0)) for key in adapter.sites},
        file="ranks.png",
        title=f"Ranks of each module ({sum(adapter.ranks().values())} in all)",
        label="rank",
    )


def trajectory(adapter: Adapter, rounds: Sequence[tuple[str, Mapping[str, int]]]) -> dict[str, Any]:
    """Small multiples: the ranks of each module at several named moments."""
    maps = [
        (name, by_role(adapter, {key: float(ranks.get(key, 0)) for key in adapter.sites})) for name, ranks in rounds
    ]
    return {
        **maps[0][1],
        "file": "allocation.png",
        "kind": "heatmaps",
        "title": "Ranks of each module over the rounds",
        "label": "rank",
        "panels": [{"title": name, "values": entry["values"]} for name, entry in maps],
    }


def by_role(
    adapter: Adapter, values: Mapping[str, float], outlined: Collection[str] = (), **entry: Any
) -> dict[str, Any]:
    """A heat map, roles × layers, of a value for each module; modules outside the layers get rows of their own."""
    cells = [(site.role or key, site.layer, key) for key, site in adapter.sites.items()]
    columns: Sequence[int | None] = sorted({layer for _, layer, _ in cells if layer is not None}) or [None]
    names = dict.fromkeys(name for name, _, _ in cells)
    rows = [*(role for role in ROLES if role in names), *(name for name in names if name not in ROLES)]
    at = {(name, columns[0] if layer is None else layer): key for name, layer, key in cells}
    framed = [[at.get((row, column)) in outlined for column in columns] for row in rows]
    return {
        "kind": "heatmap",
        "rows": rows,
        "columns": ["" if column is None else column for column in columns],
        "values": [[values.get(at.get((row, column), "")) for column in columns] for row in rows],
        **({"outlined": framed} if outlined else {}),
        "column_label": "layer",
        **entry,
    }
