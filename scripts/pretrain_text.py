"""Pretraining text of the bundled model: documents of (text, weight) pieces, drawn from a seed.

A piece's weight is its share in the loss: 1 for an answer that can be known, a little for the rest. Held-out label
words and held-out content words stand only in lists to be copied.
"""

from __future__ import annotations

from random import Random

from lowrank_cli.tasks.tiny.answers import INSTRUCTIONS, choice, description, facts, instruction, number_problem
from lowrank_cli.tasks.tiny.families import FAMILIES, Family
from lowrank_cli.tasks.tiny.lexicon import EPISODE_LABELS, Lexicon, vocabulary

Document = list[tuple[str, float]]

PLAIN = 0.1  #: weight of text that is not an answer
ANSWER = 1.0
NUMBERS = (0, 50)  #: range of the numbers in pretraining
SEPARATORS = ("\n\n", "\n\n", "\n")

#: kind of document -> share at the start and at the end of pretraining
MIXTURE = {
    "copy": (0.15, 0.04),
    "lookup": (0.45, 0.06),
    "episode": (0.25, 0.60),
    "natural": (0.10, 0.15),
    "choice": (0.01, 0.04),
    "arithmetic": (0.01, 0.05),
    "describe": (0.01, 0.02),
    "instruct": (0.02, 0.04),
}

_WORDS = vocabulary()


def document(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """One document; ``progress`` (0 … 1) moves the mixture and the number of shots from short to long."""
    weights = [start + (end - start) * progress for start, end in MIXTURE.values()]
    kind = rng.choices(list(MIXTURE), weights)[0]
    return globals()[f"_{kind}"](rng, lexicon, progress)


def _copy(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """A list of any words, said two or three times."""
    words = " " + " ".join(rng.sample(_WORDS, rng.randrange(3, 16)))
    return [(words + "\n", PLAIN)] + [(words + "\n", ANSWER)] * rng.choice((1, 2))


def _lookup(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """Pairs of a key and a label word that come again: the same key has the same label."""
    keys = rng.sample(_WORDS, rng.randrange(2, 7))
    labels = rng.sample(EPISODE_LABELS, rng.choice((2, len(keys))))
    table = {key: labels[i % len(labels)] for i, key in enumerate(keys)}
    template = rng.choice(FAMILIES["category"].templates)
    separator = rng.choice(SEPARATORS)
    pieces: Document = []
    known: set[str] = set()
    for _ in range(rng.randrange(6, 16)):
        key = rng.choice(keys)
        pieces.append((template.format(word=key), PLAIN))
        pieces.append((f" {table[key]}", ANSWER if key in known else PLAIN))
        pieces.append((separator, PLAIN))
        known.add(key)
    return pieces


def _shots(
    rng: Random, lexicon: Lexicon, family: Family, count: int, classes: list[int], words: dict[int, str]
) -> Document:
    """``count`` examples of a family, each class answered by its word."""
    template, separator = rng.choice(family.templates), rng.choice(SEPARATORS)
    pieces: Document = []
    for i in range(count):
        label = rng.choice(classes)
        pieces.append((template.format(**family.make(rng, lexicon, label)), PLAIN))
        pieces.append((f" {words[label]}", ANSWER))
        if i + 1 < count:
            pieces.append((separator, PLAIN))
    return pieces


#: family -> how often an episode draws it
_EPISODES = {
    "sentiment": 4,
    "yesno": 4,
    "entailment": 4,
    "category": 3,
    "topic": 3,
    "polarity": 2,
    "same": 1,
    "mentioned": 2,
    "opposite": 1,
    "larger": 1,
    "negated": 1,
    "tense": 1,
}

#: families of one short line, with which episodes begin
_EASY = ("category", "polarity", "same", "topic", "negated", "tense", "sentiment")


def _family(rng: Random, progress: float) -> Family:
    easy = rng.random() > 0.3 + progress
    names = [name for name in _EPISODES if not easy or name in _EASY]
    return FAMILIES[rng.choices(names, [_EPISODES[name] for name in names])[0]]


def _episode(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """Demonstrations of a family whose classes have arbitrary label words."""
    family = _family(rng, progress)
    number = len(family.classes)
    classes = rng.sample(range(number), min(number, rng.choice((2, 2, 2, 3, 4))))
    words = dict(zip(classes, rng.sample(EPISODE_LABELS, len(classes)), strict=True))
    longest = 8 + round(8 * progress) if family.name not in ("yesno", "entailment") else 8 + round(4 * progress)
    return _shots(rng, lexicon, family, rng.randrange(4, longest), classes, words)


def _natural(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """Examples answered by natural words."""
    family = _family(rng, progress + 0.3)
    classes = list(range(len(family.classes)))
    words = dict(zip(classes, rng.choice(family.natural), strict=True))
    return _shots(rng, lexicon, family, rng.choice((1, 2, 4)), classes, words)


def _choice(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """Numbered options; or the answer itself."""
    pieces: Document = []
    numbered = rng.random() < 0.7
    for _ in range(rng.choice((1, 2))):
        label = rng.randrange(4)
        row = choice(rng, lexicon, label)
        options = "".join(f"\n{i}) {option}" for i, option in enumerate(row["choices"], 1)) if numbered else ""
        pieces.append((f"{row['passage']}\nQuestion: {row['question']}{options}\nAnswer:", PLAIN))
        pieces.append((f" {label + 1 if numbered else row['choices'][label]}", ANSWER))
        pieces.append(("\n\n", PLAIN))
    return pieces[:-1]


def _arithmetic(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    pieces: Document = []
    for _ in range(rng.randrange(2, 7)):
        if rng.random() < 0.4:
            row = number_problem(rng, lexicon, *NUMBERS, plain=True)
            pieces += [(f"{row['question']}\nAnswer:", PLAIN), (f" {row['answer']}", ANSWER), ("\n", PLAIN)]
            continue
        first, second = rng.randrange(NUMBERS[1]), rng.choice((rng.randrange(10), rng.randrange(NUMBERS[1])))
        first, second = max(first, second), min(first, second)
        if first + second < NUMBERS[1] and rng.random() < 0.6:
            pieces += [(f"{first} + {second} =", PLAIN), (f" {first + second}", ANSWER), ("\n", PLAIN)]
        else:
            pieces += [(f"{first} - {second} =", PLAIN), (f" {first - second}", ANSWER), ("\n", PLAIN)]
    return pieces[:-1]


def _describe(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """Attributes and a plain sentence, or facts."""
    if rng.random() < 0.3:
        return [(" ".join(fact.text for fact in facts(rng, lexicon, 4)), PLAIN)]
    attributes = description(rng, lexicon)["attributes"]
    pairs = [part.rstrip("]").split("[") for part in attributes.split(", ")]
    said = {"job": "works as a", "city": "lives in", "likes": "likes", "has": "has a"}
    name = pairs[0][1]
    text = ". ".join(f"{name} {said[key]} {value}" for key, value in pairs[1:])
    return [("\n".join(f"{key}: {value}" for key, value in pairs) + "\nText:", PLAIN), (f" {text}.", 0.5)]


def _instruct(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    pieces: Document = []
    for _ in range(rng.choice((1, 2, 3))):
        row = instruction(rng, lexicon, rng.choice(list(INSTRUCTIONS)), plain=True)
        pieces.append((f"Input: {row['input']}\nTask: {row['instruction']}\nOutput:", PLAIN))
        pieces += [(f" {row['answer']}", ANSWER), ("\n\n", PLAIN)]
    return pieces[:-1]
