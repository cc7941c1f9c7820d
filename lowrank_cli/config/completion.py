"""Shell completion of overrides."""

from __future__ import annotations

from hydra.plugins.completion_plugin import DefaultCompletionPlugin

from lowrank_cli.config.composition import loader


def completions(verb: str, words: list[str], incomplete: str, config_dir: str | None = None) -> list[str]:
    """What ``incomplete`` may become after ``words``: groups, choices, keys and current values."""
    plugin = DefaultCompletionPlugin(loader(config_dir))
    found = plugin._query(verb, " ".join([*words, incomplete]))
    return [item for item in found if not item.rpartition("=")[2].startswith("_") and not item.startswith("hydra")]
