"""``lrk study``: arms compared on tasks over seeds, each tuned with the same budget."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range, unknown

SAMPLERS = ("grid", "random", "tpe")
UNGROUPED = "all"  #: the one group of a study that names none
RANGE = ("low", "high", "log")  #: keys of a range in a search


@dataclass
class TuneConfig:
    """Tuning before the comparison: every arm gets the same number of trials, on seeds of their own."""

    #: what is searched: a key and its values, or its range ``{low: 1e-4, high: 1e-2, log: true}``
    search: dict[str, Any] = field(default_factory=dict)
    #: ``grid`` (every combination of values), ``random``, or ``tpe`` (Optuna's tree-structured Parzen estimator)
    sampler: str = "grid"
    #: null trains every trial to its end. N is successive halving: all train for a part of the steps, the best one in N
    #: then for N times as many, and so on; the two or more that are left train to the end and are chosen from
    halving: Optional[int] = None
    budget: Optional[int] = None  #: trials of each arm on each task; with ``grid`` null, which takes all
    seeds: list[int] = field(default_factory=lambda: [100])  #: of the trials; none of the study's own
    metric: str = "dev/loss"  #: of the dev split: what the trials are chosen by; the mean over ``seeds``
    task: Optional[str] = None  #: the one task that is tuned on, for all tasks of the group; null tunes on each
    #: so many more values beyond the last one, at most, while the best trial of an arm lies there; all arms get them
    widen: int = 0

    def validate(self, key: str, seeds: Iterable[int], tasks: Iterable[str]) -> None:
        if not self.search:
            raise UserError(f"{key}.search: names no key to tune, such as {{train.learning_rate: [1e-3, 3e-3]}}")
        require_choice(f"{key}.sampler", self.sampler, SAMPLERS)
        for name, values in self.search.items():
            where = f"{key}.search.{name}"
            if isinstance(values, dict):
                self._validate_range(where, values)
            elif not isinstance(values, list) or len(values) < 2:
                raise UserError(f"{where}: {values} is no list of two values or more, and no range {{low, high}}")
        if self.budget is None and self.sampler != "grid":
            raise UserError(f"{key}.budget: sampler={self.sampler} needs the number of trials of each arm")
        if self.budget is not None:
            require_range(f"{key}.budget", self.budget, 1)
            if self.sampler == "grid":
                raise UserError(f"{key}.budget: a grid takes all of its values; leave it out, or set sampler=random")
        if both := sorted({*self.seeds} & {*seeds}):
            raise UserError(f"{key}.seeds: {both[0]} is a seed of the comparison; tuning needs seeds of its own")
        _require_seeds(f"{key}.seeds", self.seeds)
        if not self.metric.startswith("dev/"):
            raise UserError(
                f"{key}.metric: '{self.metric}' is not of the dev split (such as dev/loss); test data decide nothing"
            )
        if self.task is not None and self.task not in tasks:
            raise unknown(f"{key}.task", self.task, tasks)
        require_range(f"{key}.widen", self.widen, 0)
        self._validate_halving(key)
        if self.widen and (self.sampler != "grid" or len(self.search) > 1):
            raise UserError(f"{key}.widen: only a grid over one key can be widened")

    def _validate_halving(self, key: str) -> None:
        if self.halving is None:
            return
        require_range(f"{key}.halving", self.halving, 2)
        if self.sampler == "tpe" or self.widen:
            other = "sampler=tpe" if self.sampler == "tpe" else "widen"
            raise UserError(f"{key}.halving: does not go with {other}; set it to null, or leave {other} out")
        count = self.budget or math.prod(len(values) for values in self.search.values())
        if count < 2 * self.halving:
            raise UserError(
                f"{key}.halving: {self.halving} needs {2 * self.halving} trials or more of each arm; there are {count}"
            )

    def _validate_range(self, where: str, values: dict[str, Any]) -> None:
        if self.sampler == "grid":
            raise UserError(f"{where}: a grid needs a list of values; a range needs sampler=random or tpe")
        for name in values:
            require_choice(where, name, RANGE)
        low, high, log = values.get("low"), values.get("high"), values.get("log", False)
        numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
        if not numbers or not low < high or (log and low <= 0) or not isinstance(log, bool):  # type: ignore[operator]
            raise UserError(
                f"{where}: {values} is no range {{low: NUMBER, high: NUMBER, log: true or false}}, low below high"
            )


@dataclass
class StudyGroup:
    """Tasks that share a model and other overrides; what it names adds to what the study names."""

    overrides: list[str] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)  #: name: overrides, or arm: overrides
    arms: dict[str, list[str]] = field(default_factory=dict)  #: more overrides of an arm, here only
    prepare: dict[str, list[str]] = field(default_factory=dict)  #: steps before those of the study
    tune: Optional[TuneConfig] = None  #: instead of the study's


@dataclass
class StudyView:
    """Another figure of an arm's runs as a row of its own, such as a calibration that was scored beside the arm's."""

    arm: str = MISSING
    metric: str = MISSING  #: what follows the metric's name and ``_``: ``conca`` for ``test/accuracy_conca``
    bound: bool = False  #: it was found with the test labels: shown and never tested, for no method can have it


@dataclass
class StudyConfig:
    """Which arms are compared, on which tasks, over which seeds.

    An override may hold ``{seed}``, ``{NAME}`` of ``folders``, and ``{STEP}`` of ``prepare``: the run folder that the
    step left for this seed; ``{{word}}`` is the text ``{word}``. The first word of an arm or a step may be its verb;
    else it is ``train``. Overrides of the study, a group and a task go to the arms whose verb and method know the key.
    """

    name: str = MISSING
    arms: dict[str, list[str]] = MISSING  #: name: overrides, ``NAME: [method=NAME]``
    baseline: str = MISSING  #: the arm that the others are tested against
    seeds: list[int] = MISSING  #: of the comparison; pairs of arms share them
    overrides: list[str] = field(default_factory=list)  #: of every run
    tasks: dict[str, Any] = field(default_factory=dict)  #: of every group; name: overrides, or arm: overrides
    groups: dict[str, StudyGroup] = field(default_factory=dict)  #: models with their tasks; without any, one ``all``
    only: list[str] = field(default_factory=list)  #: groups to run; none is all of them
    pools: dict[str, list[str]] = field(
        default_factory=dict
    )  #: name: arms whose mean is one more arm; tuned as the first
    views: dict[str, StudyView] = field(default_factory=dict)  #: name: an arm and a metric of its runs; costs no runs
    prepare: dict[str, list[str]] = field(default_factory=dict)  #: name: verb and overrides; run once for each seed
    tune: Optional[TuneConfig] = None  #: how arms are tuned first; null compares them as they are
    folders: dict[str, Optional[str]] = field(default_factory=dict)  #: name: a folder or file of this machine
    extra: list[str] = field(default_factory=list)  #: overrides after all others: those of the command line

    def validate(self) -> None:
        for key in ("arms", "tasks", "groups", "pools", "views", "prepare", "folders"):
            require_names(f"study.{key}", getattr(self, key))
        if not self.arms:
            raise UserError("study.arms: there is none; name what is compared, NAME: [method=NAME]")
        if self.baseline not in self.arms:
            raise unknown("study.baseline", self.baseline, self.arms)
        _require_seeds("study.seeds", self.seeds)
        for name in self.only:
            if name not in self.groups:
                raise unknown("study.only", name, self.groups)
        for pool, members in self.pools.items():
            if pool in self.arms:
                raise UserError(f"study.pools.{pool}: is the name of an arm too")
            if not members:
                raise UserError(f"study.pools.{pool}: has no arms")
            for member in members:
                if member not in self.arms:
                    raise unknown(f"study.pools.{pool}", member, self.arms)
        for name, view in self.views.items():
            for key in ("arm", "metric"):
                if getattr(view, key) == MISSING:
                    raise UserError(f"study.views.{name}.{key}: missing; a view is {{arm: NAME, metric: NAME}}")
            if name in self.arms or name in self.pools:
                raise UserError(f"study.views.{name}: is the name of an arm or a pool too")
            if view.arm not in self.arms:
                raise unknown(f"study.views.{name}.arm", view.arm, self.arms)
        if taken := sorted({*self.folders} & {*self.steps(), "seed"}):
            raise UserError(
                f"study.folders.{taken[0]}: {{{taken[0]}}} means something else already; choose another name"
            )
        for name, group in self.active().items():
            where = f"study.groups.{name}"
            tasks = self.tasks_of(group)
            for key in ("tasks", "prepare"):
                require_names(f"{where}.{key}", getattr(group, key))
            if not tasks:
                raise UserError(f"{where}.tasks: there is none; name tasks, such as rte: [task=rte]")
            for arm in group.arms:
                if arm not in self.arms:
                    raise unknown(f"{where}.arms", arm, self.arms)
            for task, overrides in tasks.items():
                self._validate_task(f"{where}.tasks.{task}", overrides)
            if tune := group.tune or self.tune:
                tune.validate(f"{where}.tune" if group.tune else "study.tune", self.seeds, tasks)

    def _validate_task(self, where: str, overrides: Any) -> None:
        by_arm = overrides if isinstance(overrides, dict) else dict.fromkeys(self.arms, overrides)
        if missing := [arm for arm in self.arms if arm not in by_arm]:
            raise UserError(f"{where}: has no overrides for the arm '{missing[0]}'")
        for arm, words in by_arm.items():
            if arm not in self.arms:
                raise unknown(where, arm, self.arms)
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise UserError(f"{where}: {words} is no list of overrides, such as [task=rte]")

    def active(self) -> dict[str, StudyGroup]:
        """The groups that run."""
        groups = self.groups or {UNGROUPED: StudyGroup()}
        return {name: group for name, group in groups.items() if name in (self.only or groups)}

    def tasks_of(self, group: StudyGroup) -> dict[str, Any]:
        return {**self.tasks, **group.tasks}

    def steps(self) -> list[str]:
        """The names of all steps of preparation."""
        return [*self.prepare, *(name for group in self.groups.values() for name in group.prepare)]


@dataclass
class StudyRun:
    """``lrk study``."""

    outputs: str = MISSING
    name: Optional[str] = MISSING
    folder: Optional[str] = MISSING  #: of an earlier call, whose finished runs are kept where nothing of theirs changed
    workers: int = MISSING  #: runs at a time; the cores are shared among them
    study: StudyConfig = field(default_factory=StudyConfig)

    def validate(self) -> None:
        require_range("workers", self.workers, 1)


def require_names(key: str, names: Iterable[str]) -> None:
    """Raise UserError for what cannot be the name of a folder."""
    for name in names:
        if not re.fullmatch(r"\w[\w.+-]*", str(name)):
            raise UserError(
                f"{key}: '{name}' cannot name a folder (allowed: letters, digits, and _ . + - after the first)"
            )


def _require_seeds(key: str, seeds: list[int]) -> None:
    if not seeds or len({*seeds}) < len(seeds):
        raise UserError(f"{key}: {seeds} must name one seed or more, each once")
    for seed in seeds:
        require_range(key, seed, 0, 2**32 - 1)
