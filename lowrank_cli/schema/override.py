"""A word of the command line that sets a key, ``KEY=VALUE``: parsed, and with its value quoted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Override:
    """``KEY=VALUE`` as it was typed, split at its first ``=``."""

    key: str  #: a dotted key, or a group; what Hydra reads before it (``+``, ``++``, ``~``) is part of it
    value: str  #: its text, not yet read as a number or a list
    sets: bool = True  #: whether there was a ``=``; without one ``value`` is empty

    @classmethod
    def parse(cls, text: str) -> Override:
        key, equals, value = text.partition("=")
        return cls(key, value, bool(equals))

    def __str__(self) -> str:
        return f"{self.key}={self.value}" if self.sets else self.key

    @property
    def root(self) -> str:
        """The section, the group, or the key at the top: ``train`` of ``train.max_steps=5``."""
        return self.key.partition(".")[0]


def parse_overrides(words: Iterable[str]) -> list[Override]:
    """The overrides in ``words``, in their order."""
    return [Override.parse(word) for word in words]


def quoted(value: str) -> str:
    """``value`` as one quoted string of Hydra's override grammar."""
    body = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{body}'"
