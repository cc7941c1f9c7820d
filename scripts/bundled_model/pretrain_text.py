"""Pretraining text of the bundled model: documents of (text, weight) pieces, drawn from a seed.

A piece's weight is its share in the loss: 1 for an answer that can be known, a little for the rest. Held-out content
words stand only in lists to be copied and as keys of lookups, held-out label words also as labels of lookups: there
they are words like others, and nothing says what they mean.
"""

from __future__ import annotations

from random import Random

from lowrank_cli.tasks.tiny.answers import INSTRUCTIONS, choice, description, facts, instruction, number_problem
from lowrank_cli.tasks.tiny.families import FAMILIES, Family
from lowrank_cli.tasks.tiny.lexicon import EPISODE_LABELS, HELD_LABELS, SPARE_LABELS, Lexicon, vocabulary

Document = list[tuple[str, float]]

PLAIN = 0.1  #: weight of text that is not an answer
LATE_PLAIN = 0.03
ANSWER = 1.0
NUMBERS = (0, 50)  #: range of the numbers in pretraining
SEPARATORS = ("\n\n", "\n\n", "\n")

#: progress at which each phase begins; from ``late`` on, loss falls on what can be known only
PHASES = {"curriculum": 0.0, "late": 1.4, "passages": 2.25}

#: kind of document -> share at the start, where the curriculum ends (progress 1), and in each later phase
MIXTURE = {
    "copy": (0.15, 0.03, 0.02, 0.02),
    "lookup": (0.25, 0.05, 0.03, 0.02),
    "episode": (0.30, 0.54, 0.45, 0.40),
    "natural": (0.20, 0.18, 0.30, 0.26),
    "choice": (0.02, 0.06, 0.05, 0.14),
    "arithmetic": (0.03, 0.06, 0.06, 0.07),
    "describe": (0.02, 0.03, 0.03, 0.02),
    "instruct": (0.03, 0.05, 0.06, 0.07),
}

_WORDS = vocabulary()
_LOOKUP_LABELS = (*EPISODE_LABELS, *HELD_LABELS, *SPARE_LABELS)


def phase(progress: float) -> int:
    """Number of the phase, 0 for the curriculum."""
    return sum(progress >= begin for begin in PHASES.values()) - 1


def document(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """One document; ``progress`` moves the mixture, and up to 1 the number of shots from short to long."""
    now, part = phase(progress), min(1.0, progress)
    if now:
        weights = [shares[now + 1] for shares in MIXTURE.values()]
    else:
        weights = [start + (end - start) * part for start, end, *_ in MIXTURE.values()]
    kind = rng.choices(list(MIXTURE), weights)[0]
    pieces = globals()[f"_{kind}"](rng, lexicon, progress)
    return [(text, weight if weight > PLAIN else LATE_PLAIN) for text, weight in pieces] if now else pieces


def _copy(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """A list of any words, said again and again."""
    words = "".join(f" {word}" for word in rng.sample(_WORDS, rng.randrange(3, 24)))
    times = max(1, rng.randrange(32, 96) // words.count(" "))
    return [(words, PLAIN), (words * times, ANSWER)]


def _lookup(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """Pairs of a key and a label word that come again: the same key has the same label."""
    keys = rng.sample(_WORDS, rng.randrange(2, 7))
    labels = rng.sample(_LOOKUP_LABELS, rng.choice((2, len(keys))))
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


#: family -> how often an episode draws it, up to the phase ``late`` and after it
_EPISODES = {
    "sentiment": (4, 5),
    "bound": (4, 7),
    "entailment": (4, 4),
    "category": (3, 1),
    "topic": (3, 2),
    "polarity": (2, 2),
    "same": (1, 0.5),
    "mentioned": (2, 2),
    "opposite": (1, 0.5),
    "larger": (1, 0.5),
    "negated": (1, 0.5),
    "tense": (1, 0.5),
    "stated": (0, 5),
}

#: families of one short line, with which episodes begin
_EASY = ("category", "polarity", "same", "topic", "negated", "tense", "sentiment")


def _family(rng: Random, progress: float) -> Family:
    easy = rng.random() > 0.3 + progress
    names = [name for name in _EPISODES if not easy or name in _EASY]
    return FAMILIES[rng.choices(names, [_EPISODES[name][max(0, phase(progress) - 1)] for name in names])[0]]


def _episode(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """Demonstrations of a family whose classes have arbitrary label words."""
    family = _family(rng, progress)
    number = len(family.classes)
    classes = rng.sample(range(number), min(number, rng.choice((2, 2, 2, 3, 4))))
    words = dict(zip(classes, rng.sample(EPISODE_LABELS, len(classes)), strict=True))
    long = family.name in ("bound", "stated", "entailment")
    longest = 8 + round((4 if long else 8) * min(1.0, progress))
    pieces = _shots(rng, lexicon, family, rng.randrange(4, longest), classes, words)
    return _unknown(pieces) if phase(progress) else pieces


def _unknown(pieces: Document) -> Document:
    """The first time an arbitrary label word comes it cannot be known."""
    known: set[str] = set()
    weighted = []
    for text, weight in pieces:
        weighted.append((text, PLAIN if weight == ANSWER and text not in known else weight))
        known.add(text)
    return weighted


def _natural(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """Examples answered by natural words."""
    family = _family(rng, progress + 0.3 if not phase(progress) else progress)
    classes = list(range(len(family.classes)))
    words = dict(zip(classes, rng.choice(family.natural), strict=True))
    count = rng.randrange(2, 10) if phase(progress) else rng.choice((1, 2, 4))
    return _shots(rng, lexicon, family, count, classes, words)


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


_GAPS = (
    "Input: {}\nOutput:",
    "Sentence: {}\nAnswer:",
    "Word: {}\nLabel:",
    "{} is",
    "{} =>",
    "Review: {}\nSentiment:",
    "Text: {}\nClass:",
    "Premise: {}\nRelation:",
    "Question: {}\nAnswer:",
)
_AROUND = ("{}", "the {}", "the {} one", "a {} thing", "it was {}", "the story was {} again", "{} and {}")
_BRIDGED = (*("sentiment",) * 3, *("entailment",) * 4, "topic", "topic", "category", "polarity", "negated", "stated")
_ORDERS = (
    "Task: {order}\nInput: {given}\nOutput:",
    "Input: {given}\nTask: {order}\nOutput:",
    "Order: {order}\nGiven: {given}\nAnswer:",
    "{order} | {given} =>",
)
_FAINT = 0.02


def bridge(rng: Random, lexicon: Lexicon, progress: float) -> Document:
    """One document of the last stage, which learns to carry a key over the words between it and its label.

    ``progress`` (0 … 1) moves from lookups to episodes; what is left is the main stage's phase ``late``.
    """
    progress = min(1.0, progress)
    draw, lookups = rng.random(), 0.55 - 0.35 * progress
    if draw < lookups:
        return _gap_lookup(rng, progress)
    if draw < lookups + 0.25 + 0.2 * progress:
        return _bridged_episode(rng, lexicon)
    if draw < lookups + 0.25 + 0.3 * progress:
        return _coded_orders(rng, lexicon)
    return document(rng, lexicon, 1.6)


def _gap_lookup(rng: Random, progress: float) -> Document:
    """Keys that come again with their label; more and more words stand around a key and before the label."""
    keys = rng.sample(_WORDS, rng.randrange(2, 6))
    labels = rng.sample(_LOOKUP_LABELS, rng.choice((2, 2, 3)))
    table = {key: labels[i % len(labels)] for i, key in enumerate(keys)}
    template, separator = rng.choice(_GAPS), rng.choice(SEPARATORS)
    around = _AROUND[: 1 + int(progress * 6)]
    if rng.random() < 0.5:
        around = (rng.choice(around),)
    pieces: Document = []
    known: set[str] = set()
    for _ in range(rng.randrange(8, 16)):
        key = rng.choice(keys)
        pieces.append((template.format(rng.choice(around).replace("{}", key)), _FAINT))
        pieces.append((f" {table[key]}", ANSWER if key in known else _FAINT))
        pieces.append((separator, _FAINT))
        known.add(key)
    return pieces


def _bridged_episode(rng: Random, lexicon: Lexicon) -> Document:
    """Demonstrations with arbitrary label words; a class counts from its second time on."""
    family = FAMILIES[rng.choice(_BRIDGED)]
    number = len(family.classes)
    classes = rng.sample(range(number), min(number, rng.choice((2, 2, 3, 4))))
    words = dict(zip(classes, rng.sample(EPISODE_LABELS, len(classes)), strict=True))
    template, separator = rng.choice(family.templates), rng.choice(SEPARATORS)
    pieces: Document = []
    known: set[int] = set()
    for _ in range(rng.randrange(6, 14)):
        label = rng.choice(classes)
        pieces.append((template.format(**family.make(rng, lexicon, label)), _FAINT))
        pieces.append((f" {words[label]}", ANSWER if label in known else _FAINT))
        pieces.append((separator, _FAINT))
        known.add(label)
    return pieces


def _coded_orders(rng: Random, lexicon: Lexicon) -> Document:
    """Instructions named by arbitrary words; one counts from its second time on."""
    names = rng.sample(list(INSTRUCTIONS), rng.randrange(2, 5))
    orders = {name: " ".join(rng.sample(EPISODE_LABELS, rng.randrange(1, 6))) for name in names}
    template, separator = rng.choice(_ORDERS), rng.choice(SEPARATORS)
    pieces: Document = []
    known: set[str] = set()
    for _ in range(rng.randrange(5, 11)):
        name = rng.choice(names)
        row = instruction(rng, lexicon, name, plain=True)
        pieces.append((template.format(order=orders[name], given=row["input"]), _FAINT))
        pieces.append((f" {row['answer']}", ANSWER if name in known else _FAINT))
        pieces.append((separator, _FAINT))
        known.add(name)
    return pieces
