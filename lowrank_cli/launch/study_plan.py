"""What a study consists of: the overrides of every run, and where in the study's folder it lies."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lowrank_cli import methods, stages
from lowrank_cli.config.composition import ONLY_TYPED, STARTED, WRITTEN, Composed, Source
from lowrank_cli.config.errors import unknown_key
from lowrank_cli.config.keys import flat, knows
from lowrank_cli.errors import UserError, require_choice, unknown
from lowrank_cli.launch import stage
from lowrank_cli.launch.tuning import first
from lowrank_cli.methods.protocol import Calibrates
from lowrank_cli.schema import (
    TRUST,
    VERBS,
    Override,
    StudyConfig,
    StudyGroup,
    StudyRun,
    TrainConfig,
    TuneConfig,
    parse_overrides,
)

PREPARED, TUNING, RUNS = "prepared", "tuning", "runs"  #: of the study's folder
LONGEST_LABEL = 80  #: characters of the values in the name of a trial's folder


@dataclass(frozen=True)
class Cell:
    """One arm on one task."""

    group: str
    task: str
    arm: str

    def __str__(self) -> str:
        return f"{self.group}/{self.task}/{self.arm}"


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    folder: str  #: relative to the study's
    verb: str
    overrides: tuple[str, ...]
    cell: Cell | None = None  #: None for a step of preparation
    part: int = 1  #: it trains for ``1 / part`` of the steps

    def composed(self, config_dir: str | None) -> Composed:
        """The checked configuration. Raises UserError."""
        full = stage.check(self.verb, list(self.overrides), config_dir)
        if self.part == 1:
            return full
        return stage.check(self.verb, [*self.overrides, *_shorter(full.config.train, self.part)], config_dir)


class Plan:
    """The runs of a study in ``folder``; without one, ``{STEP}`` stays as it is, to be checked."""

    def __init__(self, config: StudyConfig, folder: Path | None = None):
        self.config, self.folder = config, folder
        self.groups = config.active()

    def tasks(self, group: str) -> dict[str, Any]:
        return self.config.tasks_of(self.groups[group])

    def tune(self, group: str) -> TuneConfig | None:
        return self.groups[group].tune or self.config.tune

    def steps(self, group: str) -> dict[str, list[str]]:
        """The steps of preparation, in their order."""
        return {**self.groups[group].prepare, **self.config.prepare}

    def cells(self) -> Iterator[Cell]:
        for group in self.groups:
            for task in self.tasks(group):
                yield from (Cell(group, task, arm) for arm in self.config.arms)

    def tuned_as(self, cell: Cell) -> Cell:
        """The cell whose trials decide for this one: the task that the group tunes on, the first arm of its pool."""
        tune = self.tune(cell.group)
        pools = (members[0] for members in self.config.pools.values() if cell.arm in members)
        return Cell(cell.group, (tune and tune.task) or cell.task, next(pools, cell.arm))

    def searched(self, cell: Cell) -> list[str]:
        """The keys to tune that the arm knows."""
        tune, (verb, own) = self.tune(cell.group), self._arm(cell)
        return [key for key in tune.search if _takes(verb, own, key)] if tune else []

    def seeds(self, group: str) -> list[int]:
        """Those for which a group's steps of preparation run: of the comparison and of tuning."""
        tune = self.tune(group)
        return [*self.config.seeds, *(tune.seeds if tune else [])]

    def step(self, group: str, name: str, seed: int) -> Job:
        verb, own = _verb(self.steps(group)[name], f"study.prepare.{name}")
        shared = [word for word in self.config.extra if _takes(verb, own, Override.parse(word).key)]
        words = [f"seed={seed}", *own, *shared]
        if seed not in self.config.seeds:
            words += _without_test(verb, own)
        return Job(f"{PREPARED}/{group}/{name}/{seed}", verb, self._filled(words, group, seed))

    def trial(self, cell: Cell, values: Mapping[str, Any], seed: int, part: int = 1) -> Job:
        label = _label(values) + (f"-1of{part}" if part > 1 else "")
        job = self._job(f"{TUNING}/{cell}/{label}/{seed}", cell, values, seed, _without_test(*self._arm(cell)))
        return replace(job, part=part)

    def run(self, cell: Cell, values: Mapping[str, Any], seed: int) -> Job:
        return self._job(f"{RUNS}/{cell}/{seed}", cell, values, seed)

    def example(self, cell: Cell) -> Job:
        """The run of a cell with the first seed and, of what is searched, the first values."""
        tune = self.tune(cell.group)
        values = {key: first(tune.search[key]) for key in self.searched(cell)} if tune else {}
        return self.run(cell, values, self.config.seeds[0])

    def _job(self, folder: str, cell: Cell, values: Mapping[str, Any], seed: int, last: Sequence[str] = ()) -> Job:
        verb, own = self._arm(cell)
        group, task = self.groups[cell.group], self.tasks(cell.group)[cell.task]
        task = task[cell.arm] if isinstance(task, dict) else task
        shared = [*self.config.overrides, *group.overrides, *task]
        words = [word for word in shared if _takes(verb, own, Override.parse(word).key)]
        words += [*own, *(f"{key}={value}" for key, value in values.items())]
        words += [word for word in self.config.extra if _takes(verb, own, Override.parse(word).key)]
        return Job(folder, verb, self._filled([*words, f"seed={seed}", *last], cell.group, seed), cell)

    def _arm(self, cell: Cell) -> tuple[str, list[str]]:
        own = [*self.config.arms[cell.arm], *self.groups[cell.group].arms.get(cell.arm, [])]
        return _verb(own, f"study.arms.{cell.arm}")

    def _filled(self, words: Sequence[str], group: str, seed: int) -> tuple[str, ...]:
        """The overrides with the values of ``{names}``; ``{{name}}`` stands for ``{name}`` itself."""
        steps = self.steps(group)

        def value(match: re.Match[str]) -> str:
            name = match[2]
            if match[1]:  # {{name}}
                return f"{{{match[1]}}}"
            if name in steps:
                return str(self.folder / PREPARED / group / name / str(seed)) if self.folder else match[0]
            if name in self.config.folders:
                if (path := self.config.folders[name]) is None:
                    raise UserError(f"study.folders.{name}: missing; give study.folders.{name}=FOLDER")
                return path
            if name == "seed":
                return str(seed)
            raise unknown(f"study {self.config.name}: '{match[0]}'", name, ["seed", *self.config.folders, *steps])

        return tuple(re.sub(r"\{\{(\w+)\}\}|\{(\w+)\}", value, word) for word in words)


def _label(values: Mapping[str, Any]) -> str:
    """The name of a trial's folder; with a hash where the values do not fit into one, as they are or at all."""
    text = "-".join(f"{key.rpartition('.')[2]}{value}" for key, value in values.items())
    name = re.sub(r"[^\w.+-]+", "_", text)[:LONGEST_LABEL]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _verb(words: Sequence[str], where: str) -> tuple[str, list[str]]:
    """The verb, which the first word may name, and the overrides."""
    if not words or "=" in words[0]:
        return "train", list(words)
    if words[0] not in stages.IN_RECIPES:
        raise unknown(where, words[0], stages.IN_RECIPES)
    return words[0], list(words[1:])


def _takes(verb: str, own: Sequence[str], key: str) -> bool:
    """Whether a verb, and the method that its overrides choose, know a key."""
    if key.startswith("method."):
        chosen = [override.value for override in parse_overrides(own) if override.key == "method"]
        kind = methods.config_classes().get(chosen[-1]) if chosen else None
        if kind is not None:
            return knows(kind, key.removeprefix("method."))
    return knows(VERBS[verb], key)


def _without_test(verb: str, own: Sequence[str]) -> list[str]:
    """Overrides by which a run of tuning does not measure the test split."""
    return [word for word in ("test=false", "evaluate.split=dev") if _takes(verb, own, Override.parse(word).key)]


def _shorter(train: TrainConfig, part: int) -> list[str]:
    """Overrides for ``1 / part`` of the steps; the schedule of the learning rate, a share of them, is as complete."""
    bound = [] if train.max_steps is None else [f"train.max_steps={math.ceil(train.max_steps / part)}"]
    return [f"train.epochs={train.epochs / part}", *bound]


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the study itself, and those for its runs."""
    keys = {item.name for item in fields(StudyRun)}
    own = [word for word in overrides if Override.parse(word.lstrip("+")).root in keys or not Override.parse(word).sets]
    return own, [word for word in overrides if word not in own]


def require_plain(config: StudyConfig) -> None:
    """Refuse keys that only a command line may set, and shared or searched keys that no arm knows."""
    groups: list[StudyConfig | StudyGroup] = [config, *config.active().values()]
    texts = [word for at in groups for word in _words(at)]
    searched = [key for at in groups if at.tune for key in at.tune.search]
    for key in [*(override.key for override in parse_overrides(texts)), *searched]:
        if key in (TRUST, WRITTEN, STARTED):
            raise UserError(f"study {config.name}: {key}: {ONLY_TYPED}")
    arms = {name: _verb(own, f"study.arms.{name}") for name, own in config.arms.items()}
    shared = [word for at in groups for word in at.overrides] + config.extra
    for key in dict.fromkeys([*(override.key for override in parse_overrides(shared)), *searched]):
        if not any(_takes(verb, own, key) for verb, own in arms.values()):
            if knows(StudyRun, f"study.{key}"):
                raise UserError(f"study {config.name}: {key}: unknown key; did you mean 'study.{key}'?")
            known = {name: None for verb, own in arms.values() for name in flat(VERBS[verb]) if _takes(verb, own, name)}
            raise UserError(f"study {config.name}: {unknown_key(key, list(known))}")


def _words(at: StudyConfig | StudyGroup) -> Iterator[str]:
    yield from at.overrides
    for words in (*at.arms.values(), *at.prepare.values()):
        yield from words
    for task in at.tasks.values():
        for words in task.values() if isinstance(task, dict) else [task]:
            yield from words


def composed_cells(plan: Plan, config_dir: str | None) -> dict[Cell | tuple[str, str], Composed]:
    """The checked configuration of each step, by group and name, and of each cell, with the first seed."""
    config = plan.config
    found: dict[Cell | tuple[str, str], Composed] = {}
    for group in plan.groups:
        steps: dict[str, Composed] = {}
        for name in plan.steps(group):
            steps[name] = _checked(plan.step(group, name, config.seeds[0]), f"prepare.{name}", steps, config_dir)
        for name, composed in steps.items():
            found[group, name] = composed
        for cell in (cell for cell in plan.cells() if cell.group == group):
            found[cell] = _checked(plan.example(cell), str(cell), steps, config_dir)
            if (tune := plan.tune(group)) and plan.searched(cell):
                _require_metric(tune.metric, found[cell], str(cell))
                if tune.halving:
                    _require_steps(found[cell], str(cell))
    return found


def _require_metric(metric: str, composed: Composed, where: str) -> None:
    """Raise UserError for a metric that training will not measure; what calibrates or measures shows it as it runs."""
    if composed.verb != "train" or methods.can(composed.config.method.name, Calibrates):
        return
    task = composed.config.task
    parts = (f"{name}/{part.metric}" for name, part in task.parts.items())
    try:
        require_choice("tune.metric", metric, [f"dev/{name}" for name in ("loss", task.metric, *parts)])
    except UserError as error:
        raise UserError(f"study, {where}: {error}") from None


def _require_steps(composed: Composed, where: str) -> None:
    """Raise UserError for an arm that successive halving cannot train for fewer steps."""
    if composed.verb != "train" or methods.can(composed.config.method.name, Calibrates):
        method = composed.choices["method"]
        raise UserError(f"study, {where}: tune.halving: lrk {composed.verb} with method={method} trains no steps")


def _checked(job: Job, where: str, steps: dict[str, Composed], config_dir: str | None) -> Composed:
    read = [override.value for override in parse_overrides(job.overrides) if override.key == "run"]
    earlier = steps.get(read[-1].strip("{}")) if read else None
    source = Source(read[-1], earlier.resolved, earlier.choices) if earlier else None
    try:
        return stage.check(job.verb, list(job.overrides), config_dir, source, tuple(f"{{{name}}}" for name in steps))
    except UserError as error:
        raise UserError(f"study, {where}: {error}") from None
