"""Which examples train, which choose the best adapter, which are reported.

The papers' rule: the evaluation set is the validation split where there is one, else the test split. Below
10,000 training examples, one half of the evaluation set is dev and the other half is test. Otherwise 1,000
training examples are dev and the whole evaluation set is test.

All choices here are functions of sizes and keys alone: the run's seed does not enter, so that seeds can be
compared.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from lowrank_cli.errors import UserError, nearest
from lowrank_cli.schema import TaskConfig

SEED = 2024  #: of every shuffle below; arbitrary, and never changed
SMALL = 10_000  #: training sets below this size leave the evaluation set to be halved (the papers' rule)
HELD_OUT = 1_000  #: training examples that become dev in larger sets (the papers' rule)


def names(config: TaskConfig, available: Sequence[str], where: str) -> tuple[str, ...]:
    """The splits to read: all three if ``given``, (train, evaluation set) by the papers' rule, else (train,).

    Raises:
        UserError: a split is absent; the message lists those that ``where`` has.
    """
    if config.splits == "given":
        wanted = {"train": config.train_split, "dev": config.dev_split, "test": config.test_split}
        return tuple(_present(f"task.{key}_split", name, available, where) for key, name in wanted.items())
    train = _present("task.train_split", config.train_split, available, where)
    if config.splits == "held_out":
        return (train,)
    for name in (config.dev_split, config.test_split):
        if name in available and name != train:
            return train, name
    raise UserError(
        f"task: {where} has nothing to evaluate on besides task.train_split={train} "
        f"(found: {', '.join(available)}); name another of them in task.dev_split or task.test_split"
    )


def _present(key: str, name: str, available: Sequence[str], where: str) -> str:
    if name not in available:
        raise UserError(
            f"{key}: {where} has no split '{name}'{nearest(name, available)} "
            f"(found: {', '.join(available)}); set {key}=NAME to one of them"
        )
    return name


def halves(size: int) -> tuple[list[int], list[int]]:
    """Two disjoint halves of ``range(size)``, each ascending; the first has the odd one out."""
    order = _shuffled(range(size))
    middle = (size + 1) // 2
    return sorted(order[:middle]), sorted(order[middle:])


def hold_out(keys: Sequence[Hashable], count: int = HELD_OUT) -> tuple[list[int], list[int]]:
    """(kept, held out) indices into ``keys``, each ascending.

    Equal keys stay together, so no held-out prompt is trained on; at least ``count`` indices are held out.
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
    """The first ``limit`` of a fixed shuffle of ``range(size)``, ascending: mixed labels, nested limits."""
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(_shuffled(range(size))[:limit])


def _shuffled(items) -> list:
    items = list(items)
    random.Random(SEED).shuffle(items)
    return items
