"""Shell completion of overrides."""

from __future__ import annotations

from contextlib import suppress

from hydra.plugins.completion_plugin import DefaultCompletionPlugin

from lowrank_cli.config.composition import loader
from lowrank_cli.schema import parse_overrides


def completions(verb: str, words: list[str], incomplete: str, config_dir: str | None = None) -> list[str]:
    """Completions of ``incomplete`` after ``words``: groups, choices, keys and current values.

    A single ``key=`` or ``section.`` comes with its own completions, so that shells add no space after it.
    """
    with suppress(Exception):  # a mistake elsewhere on the line: no completions, and no traceback
        plugin = DefaultCompletionPlugin(loader(config_dir))

        def query(word: str) -> list[str]:
            matches = plugin._query(verb, " ".join([*words, word]))
            hidden = ("_", "hydra")
            shown = parse_overrides(match for match in matches if not match.startswith(hidden))
            return [str(item) for item in shown if not item.value.startswith("_")]

        matches = query(incomplete)
        if len(matches) == 1 and matches[0].endswith(("=", ".")):
            matches += query(matches[0])
        return matches
    return []
