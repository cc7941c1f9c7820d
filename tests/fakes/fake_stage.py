"""A stage without a model: one line of history and one checkpoint a step, and every way to end.

``train.learning_rate`` above 1 fails at step 2 until a file ``mended`` lies in the working directory;
``train.weight_decay`` 9 is a bug; ``task.max_length`` 3 is a user's mistake; ``train.warmup`` 1 is Ctrl-C after
step 2 of an unresumed run; seed 77 waits for a signal, and says so in a file ``waiting``, unless there is one ``go``.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from lowrank_cli.errors import Diverged, UserError

BEST_RATE = 0.3  #: the one with the lowest dev loss


def run(config, run, adapter_run, *, resume=False):
    if config.task.max_length == 3:
        raise UserError("task.max_length: 3 is too short")
    train, devices = getattr(config, "train", None), os.environ.get("CUDA_VISIBLE_DEVICES")
    start = max((row["step"] for row in run.history()), default=0) if resume else 0
    for step in range(start + 1, (train.max_steps if train else 0) + 1):
        if step == 2:
            if train.learning_rate > 1 and not Path("mended").exists():
                raise Diverged("train/loss is nan at step 2")
            if train.weight_decay == 9:
                raise RuntimeError("a bug")
            if config.seed == 77 and not run.file("go").exists():
                run.write_text("waiting", "")
                time.sleep(60)
            if train.warmup == 1 and not resume:
                raise KeyboardInterrupt
        rate = train.learning_rate
        run.log({"step": step, "train/loss": 1 / step, "learning_rate": rate, "resumed": resume, "devices": devices})
    measured = "test" if getattr(config, "test", True) else "dev"
    split = getattr(getattr(config, "evaluate", None), "split", measured)
    metrics = {f"{split}/accuracy": 0.5 + config.seed / 100, "train/steps": train.max_steps if train else 0}
    return metrics | ({"dev/loss": round(abs(train.learning_rate - BEST_RATE), 4)} if train else {})
