"""A comparison as data: sections of rows, differences from the baseline, and results over several tasks.

:func:`lowrank_cli.report.compare.build_comparison` makes one. :mod:`lowrank_cli.report.formats` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

SETTING = re.compile(r" (?=[\w.]+=)")  #: between the parts of a row's setting
COSTS = ("trainable", "seconds", "memory")  #: fields of :class:`Row` that Pareto fronts are drawn over


@dataclass
class Difference:
    """One row minus the baseline's row, over the seeds that both have.

    An estimate of the error needs two seeds, or answers of both to the same test examples, and values that differ.
    Without one, ``low``, ``high``, ``p_value``, ``p_holm`` and ``detectable`` are None.
    """

    mean: float
    pairs: int  #: shared seeds
    examples: int | None  #: test examples whose sampling is part of the error; None: the error is over seeds alone
    low: float | None = None  #: 95 % confidence interval
    high: float | None = None
    p_value: float | None = None  #: of the same t test as the interval; of one pair with examples, McNemar's exact test
    p_holm: float | None = None  #: corrected for the other rows of the section
    sign_flip: float | None = None  #: p over seeds, without assumptions; None below two pairs
    #: true difference that the test would have found with 80 % power; of a share, None above 1
    detectable: float | None = None
    bootstrap: tuple[float, float] | None = None  #: 95 % interval over resampled seeds and examples


@dataclass
class Row:
    """One method with one setting, or one arm of a study, over its seeds."""

    method: str
    setting: str  #: ``key=value …`` of what varies in the section and is not what most runs have, or empty
    values: dict[int, float]  #: seed → metric
    median: float
    low: float  #: interval of the median, see :func:`lowrank_cli.report.statistics.median_interval`
    high: float
    mean: float
    std: float | None  #: sample standard deviation over seeds; None for one seed
    pool: tuple[str, ...] = ()  #: of a study: the arms that ``values`` are the mean of
    pool_values: dict[int, list[float]] = field(default_factory=dict)  #: seed → metric of each of these arms
    view: str = ""  #: of a study: the calibration beside the runs' own that ``values`` are of, or a bound
    bound: bool = False  #: ``values`` were found with the test labels: they are tested against nothing
    runs: dict[int, list[Path]] = field(default_factory=dict)  #: seed → run folder; of a pool, one for each arm
    answers: dict[int, list[Path]] = field(default_factory=dict)  #: seed → folder with its predictions.jsonl, likewise
    trainable: float | None = None  #: parameters; these four are medians over the seeds
    activated: float | None = None  #: parameters
    seconds: float | None = None  #: of training
    memory: float | None = None  #: bytes at the peak
    arrangement_std: float | None = None  #: of the metric over the arrangements within a run: median over seeds
    arrangement_worst: float | None = None  #: worst arrangement: median over seeds
    best: bool = False
    baseline: Row | None = None  #: the row that ``difference`` is taken from
    difference: Difference | None = None  #: None where no seed is shared, or for the baseline itself
    pareto: tuple[str, ...] = ()  #: those of ``COSTS`` by which no other row is as good and cheaper

    @property
    def label(self) -> str:
        """How ``--baseline`` names this row."""
        return f"{self.method} {self.setting}".strip()

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return min(self.values.values()), max(self.values.values())


@dataclass
class Section:
    """One model on one task by one metric; rows from best median to worst."""

    model: str  #: of a study, the group
    task: str
    metric: str
    lower_is_better: bool
    rows: list[Row]
    without_metric: int = 0  #: finished runs that lack the metric
    repeats: int = 0  #: older runs of a seed that a newer one replaces
    others: bool = False  #: whether runs of this task were measured on other examples too
    clashes: int = 0  #: of them, those whose setting of the same name kept other modules
    shared: str = ""  #: ``key=value …`` of most runs, left out of the settings that have it; or empty

    @property
    def title(self) -> str:
        better = "lower" if self.lower_is_better else "higher"
        return f"{self.model} · {self.task} · {self.metric} ({better} is better)"

    @property
    def default_setting(self) -> str:
        """The values that a setting has unless it says otherwise, as a line, or empty."""
        return f"unless a setting says otherwise: {self.shared}" if self.shared else ""


@dataclass
class AcrossTasks:
    """One method against the baseline on all tasks of a model together."""

    model: str  #: of a study, the group
    method: str  #: with its setting, where a task has several rows of the method
    tasks: int
    pairs: int  #: of the same task and seed
    mean: float  #: difference, of losses of their logarithms; estimated with random effects of task and seed
    low: float | None  #: 95 % confidence interval for tasks like these
    high: float | None
    p_value: float | None
    p_holm: float | None  #: corrected for the other methods of the model
    sign_flip: float | None  #: p over the means by seed, for these very tasks
    detectable: float | None  #: true difference that the test would have found with 80 % power


@dataclass
class Comparison:
    """Everything that ``lrk compare`` shows."""

    sections: list[Section]
    baseline: str | None
    across_tasks: list[AcrossTasks] = field(default_factory=list)
    unfinished: int = 0  #: runs
    in_studies: int = 0  #: runs that are left out because a study holds them
    broken: list[str] = field(default_factory=list)  #: why each broken run cannot be read
    study: str | None = None  #: its name
    cells: int = 0  #: of a study: groups × tasks × arms × seeds
    missing: int = 0  #: of these, those without a finished run
    absent: dict[str, list[str]] = field(default_factory=dict)  #: of a study: task → arms without any finished run


def priced(section: Section) -> list[Row]:
    """The rows with costs of their own: pools and views share those of the arms that they are made from."""
    return [row for row in section.rows if not (row.pool or row.view)]


def swept(rows: Sequence[Row]) -> tuple[str, dict[str, float]]:
    """The number that distinguishes the rows of every method with several rows, and its value by label.

    Other keys may vary with it, as alpha does with rank. Of several such numbers, the one with the fewest different
    values, then the last by name. ``("", {})`` if there is none.
    """
    settings = {row.label: dict(part.split("=", 1) for part in SETTING.split(row.setting) if part) for row in rows}
    methods = [[row.label for row in rows if row.method == method] for method in {row.method: None for row in rows}]
    several = [labels for labels in methods if len(labels) > 1]
    keys = set.intersection(*(set(settings[label]) for labels in several for label in labels)) if several else set()
    numbers: dict[str, dict[str, float]] = {}
    for key in keys:
        with suppress(ValueError):
            values = {label: float(settings[label][key]) for label in settings if key in settings[label]}
            if all(len({values[label] for label in labels}) == len(labels) for labels in several):
                numbers[key] = values
    if not numbers:
        return "", {}
    fewest = min(len(set(values.values())) for values in numbers.values())
    chosen = max(key for key, values in numbers.items() if len(set(values.values())) == fewest)
    return chosen, numbers[chosen]
