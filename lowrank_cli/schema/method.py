"""What every method's schema has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import MISSING


@dataclass
class MethodConfig:
    """What every method has."""

    name: str = MISSING  #: the method's registered name
    made_with: ClassVar[tuple[str, ...]] = ()  #: keys whose values what a run keeps depends on

    def validate(self) -> None:
        """Check ranges that need no model."""

    def unfit(self, made: Mapping[str, Any]) -> list[str]:
        """Keys whose values do not go with what a run of this method with the values ``made`` keeps."""
        return [key for key in self.made_with if key in made and getattr(self, key) != made[key]]

    def absorb(self, given: Collection[str]) -> dict[str, Any]:
        """Values from files that this section names: they become part of it, so that what is saved is what ran.

        ``given`` are the keys that the user set.
        """
        return {}
