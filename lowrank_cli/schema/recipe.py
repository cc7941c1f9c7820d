"""``lrk run``: a recipe of stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING


@dataclass
class StageConfig:
    """One stage of a recipe."""

    name: str = MISSING  #: unique in the recipe; ``{name}`` in a later override becomes this stage's run folder
    stage: str = MISSING  #: the verb: ``train``, ``evaluate``, …
    overrides: list[str] = field(default_factory=list)


@dataclass
class RecipeConfig:
    """A paper's whole pipeline."""

    name: str = MISSING
    stages: list[StageConfig] = MISSING


@dataclass
class RecipeRun:
    """``lrk run``."""

    outputs: str = MISSING
    name: Optional[str] = MISSING
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
