"""Where the lowest ranks or modules are cut off, and which of them stand so near that ``mixed`` measures them exactly.

``mixed`` orders all units of a group by ``taylor``. The units around the cut get exact scores and are ordered by them;
those below keep to their side, and so do those above: what is far from the cut is not worth a measurement.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lowrank_cli.adapter.adapted_model import Adapter

KEPT = 2  #: modules that a layer keeps, where nothing says how many

Values = Mapping[str, Sequence[float]]  #: of each module, its ranks' scores, or the one of the whole
Place = tuple[str, int]  #: a module's key, and the index of one of its scores


@dataclass(frozen=True)
class Cut:
    """Units that compete with each other, how many of the lowest go, and how many around that line are measured."""

    window: float  #: share of each group's units, above 0 to 1; two at least: the last that goes, the first that stays
    groups: Sequence[tuple[Sequence[str], int]]  #: keys of the modules of a group, and how many of their units go

    def size(self, counts: Mapping[str, int]) -> int:
        """How many units are measured, of modules with ``counts`` units each."""
        return sum(self._width(sum(counts[key] for key in keys)) for keys, _ in self.groups)

    def candidates(self, values: Values) -> set[Place]:
        """The units around the cuts, in the order of ``values``."""
        return {place for _, inside, _ in self._split(values) for place in inside}

    def measured(self, values: Values, exact: Mapping[str, Sequence[float | None]]) -> bool:
        """Whether the last unit that goes and the first that stays are among the ``exact`` ones, in every group."""
        ends = Cut(0.0, self.groups).candidates(values)
        return all(exact[key][index] is not None for key, index in ends)

    def joined(self, values: Values, exact: Mapping[Place, float]) -> dict[str, list[float]]:
        """``exact`` scores of all candidates. The others keep their ``values``, unless one of them would then change
        sides with a candidate: all of its side are shifted as little as prevents it, so that their order stays.
        """
        joined = {key: [*row] for key, row in values.items()}
        for below, inside, above in self._split(values):
            for side, nearest, furthest in ((below, max, min), (above, min, max)):
                if side:
                    edge = nearest(values[key][index] for key, index in side)
                    shift = furthest(0.0, furthest(exact[place] for place in inside) - edge)
                    for key, index in side:
                        joined[key][index] += shift
            for key, index in inside:
                joined[key][index] = exact[key, index]
        return joined

    def _width(self, units: int) -> int:
        return min(units, max(2, math.ceil(self.window * units)))

    def _split(self, values: Values) -> Iterator[tuple[list[Place], list[Place], list[Place]]]:
        """The units of each group, lowest first, in three: below the window, in it, above it. Of equal ones the first
        is lower."""
        for keys, drop in self.groups:
            order = [(key, index) for key in keys for index in range(len(values[key]))]
            order.sort(key=lambda place: values[place[0]][place[1]])
            width = self._width(len(order))
            start = max(0, min(drop - width // 2, len(order) - width))
            yield order[:start], order[start : start + width], order[start + width :]


def usual(adapter: Adapter, level: str, window: float) -> Cut:
    """Where nothing else is said: as many ranks as modules, at most half; all but :data:`KEPT` modules of a layer."""
    if level == "rank":
        return Cut(window, [(list(adapter.modules), min(len(adapter.modules), sum(adapter.ranks().values()) // 2))])
    groups: dict[int | None, list[str]] = defaultdict(list)
    for key in adapter.modules:
        groups[adapter.sites[key].layer].append(key)
    return Cut(window, [(keys, max(0, len(keys) - KEPT)) for keys in groups.values()])
