"""``scores.json``: the worth of each rank, or of each module, of an adapter."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from lowrank_cli.reader import Finite, Where, read_json
from lowrank_cli.runs.run import Run
from lowrank_cli.schema import KINDS

FILE = "scores.json"
#: Meanings of the numbers besides the scores.
MEANINGS = {
    "whole": "S, that is minus the dev loss (nats), with the whole adapter",
    "bare": "S with no module of the adapter",
    "without": "S without this one; of it and the next, scores = whole - without + alone - bare",
    "alone": "S with this one and no other",
    "slope_at_1": "whole - without to first order: slope of S in the gate of this one, all gates open",
    "exact": "whole - without + alone - bare; null for those that are not near the cut",
    "slope_at_0": "alone - bare to first order: the same with all gates closed; by taylor scores are their sum",
}

Level = Annotated[str, Where(KINDS.__contains__, f"one of {', '.join(KINDS)}")]
Kind = Annotated[
    str, Where(lambda kind: any(kind in of for of in KINDS.values()), "a kind of score (lrk list keys score)")
]


class ScoredModule(TypedDict):
    """One module: a score for each of its ranks, or one for the module; in the same layout what they came from."""

    module: str  #: its key in the adapter
    layer: int | None
    role: str | None
    scores: list[Finite]
    without: NotRequired[list[Finite]]
    alone: NotRequired[list[Finite]]
    slope_at_1: NotRequired[list[Finite]]
    slope_at_0: NotRequired[list[Finite]]
    exact: NotRequired[list[Finite | None]]


@dataclass(kw_only=True)
class SavedScores:
    """The content of ``scores.json``."""

    level: Level
    kind: Kind
    modules: list[ScoredModule]
    whole: Finite | None = None  #: see :data:`MEANINGS`
    bare: Finite | None = None
    reason: str = ""  #: why ``score.kind=auto`` chose this kind, if it did

    def save(self, run: Run) -> None:
        """Write the file into ``run``'s folder, with the meaning of every number in it."""
        losses = {} if self.whole is None else {"whole": self.whole, "bare": self.bare}
        measured = [name for name in (*losses, *self.modules[0]) if name in MEANINGS]
        meaning = {"scores": KINDS[self.level][self.kind]} | {name: MEANINGS[name] for name in measured}
        about = {"level": self.level, "kind": self.kind, "meaning": meaning}
        about |= {"reason": self.reason} if self.reason else {}
        run.write_json(FILE, {**about, **losses, "modules": self.modules})

    @classmethod
    def read(cls, folder: Path) -> SavedScores:
        """The scores in the folder of a run. Raises UserError if the file cannot be read or does not fit."""
        record = read_json(folder / FILE, cls)
        return cls(**{item.name: record[item.name] for item in fields(cls) if item.name in record})
