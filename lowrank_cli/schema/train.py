"""``lrk train``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range
from lowrank_cli.schema.evaluate import PredictConfig
from lowrank_cli.schema.run import RunConfig

TRACKERS = ("none", "tensorboard", "wandb", "mlflow", "trackio")


@dataclass
class TrainConfig:
    """AdamW with linear warm-up and decay, dev evaluation and early stop. A step is one optimizer update."""

    #: peak, reached after the warm-up; null: the usual one, see :mod:`lowrank_cli.schema.learning_rate`
    learning_rate: Optional[float] = MISSING
    weight_decay: float = MISSING  #: AdamW's
    warmup: float = MISSING  #: share of all steps
    epochs: float = MISSING  #: passes over the training set
    max_steps: Optional[int] = MISSING  #: bound on steps; replaces ``epochs`` in the schedule where smaller
    batch_size: int = MISSING  #: examples of one step, over all processes and accumulated batches
    gradient_accumulation: int = MISSING  #: batches summed into one step; times processes it divides ``batch_size``
    max_grad_norm: float = MISSING  #: gradients are clipped to this norm; 0 turns clipping off
    eval_every: int = MISSING  #: steps between dev evaluations
    patience: int = MISSING  #: evaluations without a better dev loss before training stops; 0 never stops
    log_every: int = MISSING  #: steps between lines of history.jsonl
    checkpoint_every: int = MISSING  #: steps between checkpoints to resume from; 0 keeps only that of an interrupt

    def validate(self) -> None:
        if self.learning_rate is not None:
            require_range("train.learning_rate", self.learning_rate, 0)
        require_range("train.weight_decay", self.weight_decay, 0)
        require_range("train.warmup", self.warmup, 0, 1)
        if not self.epochs > 0:
            raise UserError(f"train.epochs: {self.epochs} is out of range (allowed: above 0)")
        for key in ("batch_size", "gradient_accumulation", "eval_every", "log_every"):
            require_range(f"train.{key}", getattr(self, key), 1)
        for key in ("max_grad_norm", "patience", "checkpoint_every"):
            require_range(f"train.{key}", getattr(self, key), 0)
        if self.max_steps is not None:
            require_range("train.max_steps", self.max_steps, 1)


@dataclass
class TrainRun(RunConfig):
    """``lrk train``."""

    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: PredictConfig = field(default_factory=PredictConfig)
    #: an adapted run to train on, or that a calibrating method stands on; null is the pretrained model
    run: Optional[str] = MISSING
    #: what else gets the history, the configuration and the final metrics: ``tensorboard``, ``wandb``, ``mlflow`` or
    #: ``trackio`` (each an extra to install); it changes no result
    tracker: str = "none"
    test: bool = True  #: whether to measure the test split at the end, after the dev split

    def validate(self) -> None:
        require_choice("tracker", self.tracker, TRACKERS)
