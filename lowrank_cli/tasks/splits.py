"""Which examples are for training, for choosing the best adapter (dev), and for reporting (test).

The papers' rule: the evaluation set is the validation split where there is one, else the test split. Below
10,000 training examples, one half of the evaluation set is dev and the other half is test. Otherwise 1,000
training examples are dev and the whole evaluation set is test. ``whole`` does that with smaller training sets too, of
which a fifth is dev.

All choices depend on sizes and keys alone, not on the run's seed, so that runs with different seeds compare.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from lowrank_cli.errors import UserError, nearest
from lowrank_cli.schema import TaskConfig
from lowrank_cli.tasks.sources import Source

T = TypeVar("T")

SEED = 2024  #: of every shuffle below; arbitrary, and never changed
SMALL = 10_000  #: with fewer training examples, the evaluation set is halved (the papers' rule)
HELD_OUT = 1_000  #: training examples that become dev in larger sets (the papers' rule)


def names(config: TaskConfig, available: Sequence[str], source: str) -> tuple[str, ...]:
    """The splits to read: all three if ``given``, (train, evaluation set) by the papers' rule, else (train,).

    Args:
        available: the splits that the data set has.
        source: name of the data set in messages.

    Raises:
        UserError: a split is absent; the message lists those available.
    """
    if config.splits == "given":
        wanted = {"train": config.train_split, "dev": config.dev_split, "test": config.test_split}
        halved = config.train_split in available and (config.dev_split in available or config.test_split in available)
        instead = ", or task.splits=paper to make dev and test out of one" if halved else ""
        return tuple(_require(f"task.{key}_split", name, available, source, instead) for key, name in wanted.items())
    train = _require("task.train_split", config.train_split, available, source)
    if config.splits == "held_out":
        return (train,)
    for name in (config.dev_split, config.test_split):
        if name in available and name != train:
            return train, name
    raise UserError(
        f"task: {source} has nothing to evaluate on besides task.train_split={train} "
        f"(found: {', '.join(available)}); name another of them in task.dev_split or task.test_split"
    )


def alone(config: TaskConfig, split: str, source: Source) -> str | None:
    """The split of the data that is all of ``split`` (dev or test); None if the data's train split decides on it too.

    Without a train split the papers' rule has nothing to decide: what is there to evaluate on is ``split``.
    """
    own = {"dev": config.dev_split, "test": config.test_split}
    if source.whole or (config.splits != "given" and config.train_split in source.splits):
        return None
    if config.splits == "given":
        return _require(f"task.{split}_split", own[split], source.splits, source.name)
    return next((name for name in (own.pop(split), *own.values()) if name in source.splits), None)


def _require(key: str, name: str | None, available: Sequence[str], source: str, instead: str = "") -> str:
    if name is None or name not in available:
        raise UserError(
            f"{key}: {source} has no split '{name}'{nearest(name, available)} "
            f"(found: {', '.join(available)}); set {key}=NAME to one of them{instead}"
        )
    return name


def halves(size: int) -> tuple[list[int], list[int]]:
    """Two disjoint halves of ``range(size)``, each ascending; the first has one more if ``size`` is odd."""
    order = _shuffled(range(size))
    middle = (size + 1) // 2
    return sorted(order[:middle]), sorted(order[middle:])


def hold_out(keys: Sequence[Hashable], count: int = HELD_OUT) -> tuple[list[int], list[int]]:
    """(kept, held out) indices into ``keys``, each ascending; at least ``count`` are held out.

    Equal keys stay together, so that no held-out prompt is trained on.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    kept: list[int] = []
    held: list[int] = []
    for group in _shuffled(groups.values()):
        (held if len(held) < count else kept).extend(group)
    return sorted(kept), sorted(held)


def limited(size: int, limit: int | None) -> list[int]:
    """The first ``limit`` of a fixed shuffle of ``range(size)``, ascending: a larger limit adds to a smaller one's."""
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(_shuffled(range(size))[:limit])


def _shuffled(items: Iterable[T]) -> list[T]:
    shuffled = list(items)
    random.Random(SEED).shuffle(shuffled)
    return shuffled
