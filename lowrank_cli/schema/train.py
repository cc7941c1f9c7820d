"""``lrk train``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range
from lowrank_cli.schema.evaluate import PredictConfig
from lowrank_cli.schema.run import RunConfig

TRACKERS = ("none", "tensorboard", "wandb", "mlflow", "trackio")
OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "muon", "schedule_free")
SCHEDULES = ("linear", "cosine", "constant", "wsd")
#: What to install for an optimizer that the package alone does not bring: a library, and the extra that holds it.
OPTIMIZER_LIBRARIES = {"adamw_8bit": ("bitsandbytes", "4bit"), "schedule_free": ("schedulefree", "schedule_free")}


@dataclass
class TrainConfig:
    """An optimizer and its schedule, dev evaluation and early stop. A step is one optimizer update."""

    #: peak, reached after the warm-up; null: the usual one, see :mod:`lowrank_cli.schema.learning_rate`
    learning_rate: Optional[float] = MISSING
    #: ``adamw``; ``adamw_8bit``, moments in 8 bits; ``adafactor``, second moments by row and column; ``muon`` for
    #: matrices inside the layers, AdamW for the rest; ``schedule_free``, AdamW that averages its iterates
    optimizer: str = "adamw"
    #: after the warm-up: ``linear`` or ``cosine`` decay to 0, ``constant``, or ``wsd`` (constant, then linear decay);
    #: null: linear, for schedule_free constant
    schedule: Optional[str] = None
    decay: float = 0.2  #: share of all steps in which ``schedule=wsd`` decays
    weight_decay: float = MISSING  #: decoupled: shrinks the trained weights by this times the learning rate
    warmup: float = MISSING  #: share of all steps
    epochs: float = MISSING  #: passes over the training set
    max_steps: Optional[int] = MISSING  #: bound on steps; replaces ``epochs`` in the schedule where smaller
    batch_size: int = MISSING  #: examples of one step, over all processes and accumulated batches
    gradient_accumulation: int = MISSING  #: batches summed into one step; times processes it divides ``batch_size``
    #: put the examples of a batch behind each other in one row, without padding; each attends to itself only. Steps are
    #: then random draws of examples instead of examples of similar lengths
    packing: bool = False
    max_grad_norm: float = MISSING  #: gradients are clipped to this norm; 0 turns clipping off
    eval_every: int = MISSING  #: steps between dev evaluations
    eval_first: bool = False  #: whether to evaluate dev before the first step too; that adapter can be the best
    patience: int = MISSING  #: evaluations without a better dev loss before training stops; 0 never stops
    log_every: int = MISSING  #: steps between lines of history.jsonl
    checkpoint_every: int = MISSING  #: steps between checkpoints to resume from; 0 keeps only that of an interrupt

    @property
    def usual_schedule(self) -> str:
        """What ``schedule=null`` stands for."""
        return "constant" if self.optimizer == "schedule_free" else "linear"

    def validate(self) -> None:
        require_choice("train.optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule is not None:
            require_choice("train.schedule", self.schedule, SCHEDULES)
            if self.optimizer == "schedule_free" and self.schedule != "constant":
                raise UserError(
                    f"train.schedule: '{self.schedule}' decays the learning rate, and train.optimizer=schedule_free "
                    f"averages instead (allowed: constant)"
                )
        require_range("train.decay", self.decay, 0, 1)
        if self.learning_rate is not None:
            require_range("train.learning_rate", self.learning_rate, 0)
        require_range("train.weight_decay", self.weight_decay, 0)
        require_range("train.warmup", self.warmup, 0, 1)
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise UserError(
                f"train.decay: {self.decay:g} and train.warmup={self.warmup:g} are more than all steps "
                f"(allowed together: at most 1)"
            )
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
