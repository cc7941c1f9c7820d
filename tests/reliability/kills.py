"""Runs killed at random moments, once or more; ``--resume`` must end with what an uninterrupted run computes."""

from __future__ import annotations

import random
import time
from pathlib import Path

from .box import Box, outcome, same
from .command import Ended
from .samples import Samples, training
from .trial import Failed

#: What a write leaves behind that a kill cut short.
LEFTOVERS = (".step-*", ".adapter-*", ".*.json-*", ".*.jsonl-*", ".*.yaml-*")


def trial(seed: int, box: Box, samples: Samples) -> None:
    """One to three kills of one method's training; the methods take turns."""
    chance, methods = random.Random(seed), trainable()
    method = methods[seed % len(methods)]
    expected, took = outcome(samples.method(method)), samples.seconds(method)
    moments = [chance.uniform(0.02, 1.05) * took for _ in range(chance.choice((1, 1, 1, 2, 3)))]
    box.case = f"{method}, killed after {', '.join(f'{moment:.2f}' for moment in moments)} s"
    arguments = ["train", *training(method)]
    for moment in (*moments, None):
        ended = killed(box, arguments, moment)
        if ended is not None and (ended.code == 0 or "is finished" in ended.err):
            break
        if ended is not None:
            raise Failed(f"cannot be continued: {ended.err.strip()}")
        box.run("list", "runs", codes=(0,))
        run = newest(box)
        if run is not None:
            arguments = ["train", "--resume", str(run.relative_to(box.work))]
    run = newest(box)
    assert run is not None
    same(outcome(run), expected, "resumed")
    left = [path.name for pattern in LEFTOVERS for path in run.rglob(pattern)]
    if left:
        raise Failed(f"a file of the killed process is left after the run has ended: {left[0][:8]}…")


def killed(box: Box, arguments: list[str], moment: float | None) -> Ended | None:
    """Start a command and kill it ``moment`` seconds later; how it ended where it did so by itself."""
    command = box.start(*arguments)
    limit = time.monotonic() + (moment or 0)
    while moment is not None and command.running() and time.monotonic() < limit:
        time.sleep(0.002)
    if moment is not None and command.running():
        command.kill()
        command.wait(10)
        return None
    return box.judged(command.wait(120), codes=(0, 2))


def newest(box: Box) -> Path | None:
    """The run folder that can be continued: the last that has a run.json."""
    return max((path.parent for path in box.work.glob("outputs/2*/*/run.json")), default=None)


def trainable() -> list[str]:
    """Every method that has a stage train."""
    from lowrank_cli import methods

    return [name for name in methods.names() if "train" in methods.capabilities(name)]
