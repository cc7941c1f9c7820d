"""What every verb that makes a run is configured by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError
from lowrank_cli.schema.hardware import HardwareConfig
from lowrank_cli.schema.metric import OF_ENCODERS
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


def check_task(model: ModelConfig, task: TaskConfig) -> None:
    """Raise UserError unless a model of this kind can answer the task."""
    for single in task.parts.values() or [task]:
        if model.kind == "encoder" and single.answer not in ("labels", *OF_ENCODERS):
            raise UserError(
                f"model.kind: {model.name} is an encoder and predicts labels, but task={single.name} has "
                f"task.answer={single.answer}; choose a causal model (model=llama) or a task with labels"
            )
        if model.kind == "causal" and single.answer in OF_ENCODERS:
            raise UserError(
                f"model.kind: {model.name} is causal, but task={single.name} has task.answer={single.answer}, which an "
                f"encoder's head gives; choose an encoder (model=roberta_base, model=minilm)"
            )
        if single.image is not None and not model.images:
            raise UserError(
                f"model.images: {model.name} reads no images, and task={single.name} has them in task.image="
                f"{single.image}; choose an image encoder (model=vit_base, model=clip_vit_b16, model=siglip_base), or "
                f"if it is one set model.kind=encoder model.images=true"
            )
        if single.image is None and model.images:
            raise UserError(
                f"model.images: {model.name} reads images, and task={single.name} has none; name their column in "
                f"task.image (task=image_folder task.path=FOLDER), or choose a model that reads text"
            )
        if task.parts and single.answer in OF_ENCODERS:
            raise UserError(
                f"task.parts.{single.name}.answer: {single.answer} has a head of its own; train {single.name} alone "
                f"(allowed in a mix: labels, choices, free, chat)"
            )
