"""The cut between pruned and kept ranks or modules, and the units near it, which ``mixed`` scores exactly.

``mixed`` orders all units of a group by ``taylor``. Units near the cut get exact scores and are ordered by them; the
others stay on their side of the cut and are not measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lowrank_cli.adapter.adapted_model import Adapter

KEPT = 2  #: modules that a layer keeps by default

Values = Mapping[str, Sequence[float]]  #: by module, the scores of its ranks, or its single score
UnitIndex = tuple[str, int]  #: a module's key and the index of one of its scores


@dataclass(frozen=True)
class Cut:
    """Groups of competing units, how many of each are pruned, and how many near the cut are measured."""

    #: share of each group's units that is measured, above 0 to 1; at least the last pruned and the first kept
    window: float
    groups: Sequence[tuple[Sequence[str], int]]  #: the modules' keys, and how many of their units are pruned

    def size(self, counts: Mapping[str, int]) -> int:
        """The number of units to measure, for modules with ``counts`` units each."""
        return sum(self._width(sum(counts[key] for key in keys)) for keys, _ in self.groups)

    def candidates(self, values: Values) -> set[UnitIndex]:
        """The units near the cuts."""
        return {unit for _, inside, _ in self._split(values) for unit in inside}

    def measured(self, values: Values, exact: Mapping[str, Sequence[float | None]]) -> bool:
        """Whether the last pruned and the first kept unit of every group have ``exact`` scores."""
        ends = Cut(0.0, self.groups).candidates(values)
        return all(exact[key][index] is not None for key, index in ends)

    def joined(self, values: Values, exact: Mapping[UnitIndex, float]) -> dict[str, list[float]]:
        """``exact`` scores for all candidates, and ``values`` for the others.

        If one of the others would swap sides with a candidate, its whole side is shifted just enough to prevent that.
        """
        joined = {key: [*row] for key, row in values.items()}
        for below, inside, above in self._split(values):
            for side, nearest, furthest in ((below, max, min), (above, min, max)):
                if side:
                    edge = nearest(values[key][index] for key, index in side)
                    shift = furthest(0.0, furthest(exact[unit] for unit in inside) - edge)
                    for key, index in side:
                        joined[key][index] += shift
            for key, index in inside:
                joined[key][index] = exact[key, index]
        return joined

    def _width(self, units: int) -> int:
        return min(units, max(2, math.ceil(self.window * units)))

    def _split(self, values: Values) -> Iterator[tuple[list[UnitIndex], list[UnitIndex], list[UnitIndex]]]:
        """The units of each group, lowest first: below, in and above the window. Ties: the first is lower."""
        for keys, drop in self.groups:
            order = [(key, index) for key in keys for index in range(len(values[key]))]
            order.sort(key=lambda unit: values[unit[0]][unit[1]])
            width = self._width(len(order))
            start = max(0, min(drop - width // 2, len(order) - width))
            yield order[:start], order[start : start + width], order[start + width :]


def usual(adapter: Adapter, level: str, window: float) -> Cut:
    """The default cut: prune as many ranks as modules, at most half; or all but :data:`KEPT` modules of a layer."""
    if level == "rank":
        return Cut(window, [(list(adapter.modules), min(len(adapter.modules), sum(adapter.ranks().values()) // 2))])
    groups: dict[int | None, list[str]] = defaultdict(list)
    for key in adapter.modules:
        groups[adapter.sites[key].layer].append(key)
    return Cut(window, [(keys, max(0, len(keys) - KEPT)) for keys in groups.values()])
