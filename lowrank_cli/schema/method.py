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
    made_with: ClassVar[tuple[str, ...]] = ()  #: settings that cannot change once a run has saved an adapter

    def validate(self) -> None:
        """Check ranges that need no model."""

    def unfit(self, made: Mapping[str, Any]) -> list[str]:
        """Keys whose values do not go with what a run of this method with the values ``made`` keeps."""
        return [key for key in self.made_with if key in made and getattr(self, key) != made[key]]

    def values_from_files(self, given: Collection[str]) -> dict[str, Any]:
        """Values from the files that this section names, to be saved in it, so that the saved file is what ran.

        Args:
            given: the section's keys that the user set.
        """
        return {}
