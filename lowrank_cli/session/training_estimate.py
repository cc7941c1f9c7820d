"""What a training will take, estimated without loading its model: steps, tokens and time.

The time is that of the model's matrix products at the speed that this machine shows right now. Measured for LoRA on one
core, a step reaches a share of that speed which grows with the width: 0.2 at 128 and 0.5 at 576 (see OVERHEAD).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import fmean, mode
from typing import Any

from safetensors import SafetensorError, safe_open

from lowrank_cli import tasks
from lowrank_cli.methods.protocol import Method
from lowrank_cli.models.outline import folder_of
from lowrank_cli.reader import read_json
from lowrank_cli.schema import TaskConfig, TrainRun
from lowrank_cli.tasks.task import Example

SAMPLE = 256  #: examples whose tokens are counted
LARGEST = 2**28  #: bytes of a data file that is read for an estimate
CHARACTERS = 4  #: of a token, where the model has no tokenizer.json
OVERHEAD = 500  #: a model of this width spends half of its time outside of matrix products
SECONDS = 0.1  #: for which the speed of matrix products is measured
NOT_LINEAR = ("embed", "wte", "wpe", "lm_head")  #: in the names of matrices that not every token is multiplied with


@dataclass(frozen=True)
class TrainingEstimate:
    """A training in numbers."""

    steps: int  #: optimizer updates, without early stopping
    examples: int  #: of one pass
    batch_size: int  #: examples of a step
    tokens: float  #: of all steps, with repetitions
    minutes: float | None = None  #: training and its evaluations on this CPU; None: not a CPU, or weights not here
    speed: float = 0.0  #: floating-point operations a second that ``minutes`` assumes

    def rows(self) -> list[tuple[str, str]]:
        """Rows of a plan."""
        epochs = self.steps * self.batch_size / self.examples
        rows = [
            (
                "steps",
                f"{self.steps:,}, {epochs:.3g} passes over {self.examples:,} examples, about {self.tokens:,.0f} tokens",
            )
        ]
        if self.minutes is not None:
            shown = f"{self.minutes:.1f} min" if self.minutes < 99.5 else f"{self.minutes / 60:.1f} h"
            rows.append(("time", f"about {shown} (an estimate, at {self.speed / 1e9:.0f} GFLOP/s)"))
        return rows


def training_estimate(config: TrainRun, method: Method) -> TrainingEstimate | None:
    """The estimate for ``config``; None if its data are not on this machine, or too large to read for this.

    Raises:
        UserError: the data do not fit the task.
    """
    settings = config.train
    if not all(map(_is_here, config.task.parts.values() or [config.task])):
        return None
    task = tasks.load(config.task)
    steps = max(1, math.ceil(settings.epochs * math.ceil(len(task.train) / settings.batch_size)))
    steps = min(steps, settings.max_steps or steps)
    folder = folder_of(config.model)
    train, dev, test = (len(split) * _length(split, config, folder) for split in (task.train, task.dev, task.test))
    tokens = steps * min(settings.batch_size, len(task.train)) * train / len(task.train)
    sizes = _matrices(folder) if folder else []
    if not sizes or config.hardware.device != "cpu":
        return TrainingEstimate(steps, len(task.train), settings.batch_size, tokens)
    products, width = sum(rows * columns for rows, columns in sizes), mode(columns for _, columns in sizes)
    passes = 3 if method.rewrites() else 2  # forward, inputs' gradients, and the weights' where these train
    evaluated = dev * (math.ceil(steps / settings.eval_every) + 1) + (test if config.test else 0)
    speed = _speed(width) * width / (width + OVERHEAD)
    seconds = 2 * products * (passes * tokens + evaluated) / speed
    return TrainingEstimate(steps, len(task.train), settings.batch_size, tokens, seconds / 60, speed)


def _is_here(task: TaskConfig) -> bool:
    if task.path is None:
        return task.generator is not None
    path = Path(task.path)
    files = [path] if path.is_file() else path.rglob("*")
    return path.exists() and sum(file.stat().st_size for file in islice(files, 10_000)) <= LARGEST


def _length(examples: Sequence[Example], config: TrainRun, folder: Path | None) -> float:
    """Mean number of tokens of an example, or patches of an image."""
    if config.model.images:
        from lowrank_cli.adapter.image_input import image_tokens  # imports torch

        return image_tokens(read_json(folder / "config.json", dict[str, Any]) if folder else {})
    sample = examples[:SAMPLE]
    if config.model.kind == "encoder":
        texts = [" ".join(item.text) for item in sample]
    else:
        texts = [" ".join(turn.content for turn in item.turns) or item.prompt + item.answer for item in sample]
    lengths = [len(text) / CHARACTERS for text in texts]
    if folder and (file := folder / "tokenizer.json").is_file():
        lengths = [len(row.ids) for row in _tokenizer(file).encode_batch(texts)]
    return fmean(min(length + 1, config.task.max_length) for length in lengths)


@cache  # one for all splits
def _tokenizer(file: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))


def _matrices(folder: Path) -> list[tuple[int, int]]:
    """The shapes of the matrices in every layer, from the headers of the safetensors files."""
    shapes = []
    for file in sorted(folder.glob("*.safetensors")):
        with suppress(SafetensorError), safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                shape = tensors.get_slice(name).get_shape()
                if len(shape) == 2 and not any(word in name for word in NOT_LINEAR):
                    shapes.append((shape[0], shape[1]))
    return shapes


@cache
def _speed(width: int) -> float:
    """Floating-point operations a second of products of (512, width) with (width, 2 · width) matrices."""
    import numpy as np

    rows, matrix = np.ones((512, width), np.float32), np.ones((width, 2 * width), np.float32)
    rows @ matrix
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        rows @ matrix
        count += 1
    return count * 2 * 512 * width * 2 * width / (time.perf_counter() - start)
