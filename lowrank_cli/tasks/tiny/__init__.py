"""The ``tiny_*`` tasks: generated, deterministic, without any outside data.

They are made for the bundled model (docs/results/bundled_model.md): label words, a share of the content words, all
names and the number range are held out from its pretraining, so that a method has something to learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from lowrank_cli.errors import require_choice
from lowrank_cli.tasks.tiny.answers import INSTRUCTIONS, category_question, description, instruction, number_problem
from lowrank_cli.tasks.tiny.families import FAMILIES, turned
from lowrank_cli.tasks.tiny.lexicon import Lexicon

NAMES = (
    "tiny_yesno",
    "tiny_choice",
    "tiny_sentiment",
    "tiny_entailment",
    "tiny_topic",
    "tiny_arithmetic",
    "tiny_data2text",
    "tiny_instruct",
)

#: Numbers of examples of each split.
SIZES = {"train": 2048, "dev": 256, "test": 512}

#: Chance that a content word is one whose meaning pretraining never showed.
HELD_WORDS = 0.3

#: Share of tiny_sentiment that says one thing and then the opposite.
TURNED = 0.3

#: Topics that tiny_topic tells apart, in the order of its label words.
TOPICS = ("fruit", "job", "weather", "sport")

#: tiny_arithmetic works on these numbers (pretraining: 0 … 49).
NUMBERS = (50, 80)


def generate(name: str, seed: int = 0, sizes: Mapping[str, int] = SIZES) -> dict[str, list[dict]]:
    """Rows of every split; no row stands in two splits, classes are balanced to within one row.

    Args:
        name: one of :data:`NAMES`.
        seed: another seed is another draw of the same task.
        sizes: rows of ``train``, ``dev`` and ``test``.

    Raises:
        UserError: an unknown name.
    """
    require_choice("task.generator", name, NAMES)
    seen: set[str] = set()
    splits = {}
    for split in ("train", "dev", "test"):
        rng = Random(f"{name} {split} {seed}")
        lexicon = Lexicon(rng, split, HELD_WORDS)
        rows: list[dict] = []
        while len(rows) < sizes[split]:
            row = _row(name, rng, lexicon, len(rows))
            key = repr(row)
            if key not in seen:
                seen.add(key)
                rows.append(row)
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def _row(name: str, rng: Random, lexicon: Lexicon, index: int) -> dict:
    family = FAMILIES.get(name.removeprefix("tiny_"))
    if name == "tiny_topic":
        label = index % len(TOPICS)
        return {**family.make(rng, lexicon, family.classes.index(TOPICS[label])), "label": label}
    if family is not None:
        label = index % len(family.classes)
        make = turned if name == "tiny_sentiment" and rng.random() < TURNED else family.make
        return {**make(rng, lexicon, label), "label": label}
    if name == "tiny_choice":
        return category_question(rng, lexicon, index % 4)
    if name == "tiny_arithmetic":
        return number_problem(rng, lexicon, *NUMBERS, plain=False)
    if name == "tiny_data2text":
        return description(rng, lexicon)
    return instruction(rng, lexicon, list(INSTRUCTIONS)[index % len(INSTRUCTIONS)], plain=False)
