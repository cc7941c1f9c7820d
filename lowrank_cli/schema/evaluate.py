"""``lrk evaluate``, and how any verb predicts answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import require_choice, require_range
from lowrank_cli.schema.harness import HarnessConfig
from lowrank_cli.schema.run import RunConfig


@dataclass
class PredictConfig:
    """How answers are predicted."""

    batch_size: int = MISSING  #: prompts of one batch
    num_beams: int = MISSING  #: 1 is greedy decoding
    shots: int = MISSING  #: demonstrations from the training set in front of each prompt

    def validate(self) -> None:
        require_range("evaluate.batch_size", self.batch_size, 1)
        require_range("evaluate.num_beams", self.num_beams, 1)
        require_range("evaluate.shots", self.shots, 0)


@dataclass
class EvaluateConfig(PredictConfig):
    """What an evaluation of its own measures; training measures dev, and test unless ``test=false``."""

    split: str = MISSING  #: ``dev`` or ``test``

    def validate(self) -> None:
        super().validate()
        require_choice("evaluate.split", self.split, ("dev", "test"))


@dataclass
class EvaluateRun(RunConfig):
    """``lrk evaluate``."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    eval: Optional[HarnessConfig] = None  #: what to measure instead of the task; null: the task
    run: Optional[str] = MISSING  #: folder of a run with an adapter; null takes the newest finished one
