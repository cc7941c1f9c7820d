"""Shell completion of overrides."""

from __future__ import annotations

from contextlib import suppress

from hydra.plugins.completion_plugin import DefaultCompletionPlugin

from lowrank_cli.config.composition import loader
from lowrank_cli.schema import parse_overrides


def completions(verb: str, words: list[str], incomplete: str, config_dir: str | None = None) -> list[str]:
    """What ``incomplete`` may become after ``words``: groups, choices, keys and current values.

    A single ``key=`` or ``section.`` comes with what may follow it, so that shells put no space behind it.
    """
    with suppress(Exception):  # a line that is wrong elsewhere has no completions, and no traceback
        plugin = DefaultCompletionPlugin(loader(config_dir))

        def query(word: str) -> list[str]:
            found = plugin._query(verb, " ".join([*words, word]))
            hidden = ("_", "hydra")
            shown = parse_overrides(item for item in found if not item.startswith(hidden))
            return [str(item) for item in shown if not item.value.startswith("_")]

        found = query(incomplete)
        if len(found) == 1 and found[0].endswith(("=", ".")):
            found += query(found[0])
        return found
    return []
