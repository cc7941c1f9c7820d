"""No adaptation: the frozen model, for zero-shot and few-shot baselines."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_cli.methods.protocol import Method
from lowrank_cli.schema import MethodConfig


@dataclass
class FrozenConfig(MethodConfig):
    """Nothing to set."""


class Frozen(Method):
    """Evaluates the model as it is; cannot be trained."""

    Config = FrozenConfig
