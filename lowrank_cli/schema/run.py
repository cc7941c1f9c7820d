"""What every verb that makes a run is configured by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from lowrank_cli.schema.hardware import HardwareConfig
from lowrank_cli.schema.model import ModelConfig
from lowrank_cli.schema.task import TaskConfig


@dataclass
class RunConfig:
    """What every verb that makes a run has."""

    seed: int = MISSING  #: of data order, initialisation and dropout
    outputs: str = MISSING  #: folder of run folders, relative to the caller's directory
    name: Optional[str] = MISSING  #: a label added to the run folder's name
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    method: Any = MISSING  #: a :class:`MethodConfig`
