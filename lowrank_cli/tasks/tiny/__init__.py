"""The ``tiny_*`` tasks: generated and deterministic, without outside data.

They are for the bundled model (docs/results/bundled_model.md): its pretraining never shows their label words, some of
their content words, their names and their range of numbers, so that a method has something to learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from lowrank_cli.errors import require_choice
from lowrank_cli.tasks.tiny.answers import (
    INSTRUCTIONS,
    Row,
    category_question,
    description,
    instruction,
    number_problem,
)
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

#: Number of examples in each split.
SIZES = {"train": 2048, "dev": 256, "test": 512}

#: Probability that a content word is held out from pretraining.
HELD_WORDS = 0.3

#: Share of the reviews of tiny_sentiment that end with the opposite opinion.
TURNED = 0.3

#: Topics of tiny_topic, in the order of its label words.
TOPICS = ("fruit", "job", "weather", "sport")

#: Range of the numbers in tiny_arithmetic (pretraining: 0 … 49).
NUMBERS = (50, 80)


def generate(name: str, seed: int = 0, sizes: Mapping[str, int] = SIZES) -> dict[str, list[Row]]:
    """Rows of every split. No row is in two splits; classes are balanced to within one row.

    Args:
        name: one of :data:`NAMES`.
        seed: draws the rows.
        sizes: number of rows in ``train``, ``dev`` and ``test``.

    Raises:
        UserError: unknown name.
    """
    require_choice("task.generator", name, NAMES)
    seen: set[str] = set()
    splits = {}
    for split in ("train", "dev", "test"):
        rng = Random(f"{name} {split} {seed}")
        lexicon = Lexicon(rng, split, HELD_WORDS)
        rows: list[Row] = []
        while len(rows) < sizes[split]:
            row = _row(name, rng, lexicon, len(rows))
            key = repr(row)
            if key not in seen:
                seen.add(key)
                rows.append(row)
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def _row(name: str, rng: Random, lexicon: Lexicon, index: int) -> Row:
    family = FAMILIES.get(name.removeprefix("tiny_"))
    if name == "tiny_topic":
        assert family is not None
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
