"""Families of generated classification examples: a latent class decides the text, label words name the classes.

The same functions make the ``tiny_*`` tasks and the pretraining text of the bundled model, with a different
:class:`~lowrank_cli.tasks.tiny.lexicon.Lexicon` and other label words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from lowrank_cli.tasks.tiny.lexicon import Lexicon

Columns = dict[str, str]


@dataclass(frozen=True)
class Family:
    """A kind of text with a latent class."""

    name: str
    classes: tuple[str, ...]  #: names of the latent classes, never shown to a model
    natural: tuple[tuple[str, ...], ...]  #: sets of label words that pretraining uses, in class order
    templates: tuple[str, ...]  #: prompts; the first is that of the ``tiny_*`` task, if there is one
    make: Callable[[Random, Lexicon, int], Columns]  #: columns of one example of class ``int``


def article(word: str) -> str:
    """The word after ``a`` or ``an``."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def sentiment(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """A review; class 1 likes the thing. One or two words carry the polarity."""
    adjective, verb = ("good", "liked") if label else ("bad", "disliked")
    thing = lexicon.word("thing")
    name = lexicon.people(1)[0]
    kind = rng.randrange(5)
    if kind == 0:
        text = f"The {thing} was {lexicon.word(adjective)}."
    elif kind == 1:
        text = f"The {thing} of {name} was {lexicon.word(adjective)} {lexicon.word('filler')}."
    elif kind == 2:
        text = f"{name} {lexicon.word(verb)} the {thing} {lexicon.word('filler')}."
    elif kind == 3:
        first, second = lexicon.words(adjective, 2)
        text = f"{article(first).capitalize()} {thing} in {lexicon.word('city')}, {second} {lexicon.word('filler')}."
    else:
        text = f"{name} {lexicon.word(verb)} this {lexicon.word(adjective)} {thing}."
    return {"sentence": text}


def turned(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """A review that ends with the opposite opinion; never in pretraining."""
    first, last = ("bad", "good") if label else ("good", "bad")
    thing, second = lexicon.words("thing", 2)
    if rng.random() < 0.5:
        text = f"The {thing} was {lexicon.word(first)} but the {second} was {lexicon.word(last)}."
    else:
        text = f"{lexicon.people(1)[0]} called the {thing} {lexicon.word(first)}, then {lexicon.word(last)}."
    return {"sentence": text}


@dataclass(frozen=True)
class Fact:
    """``name relation color item``"""

    name: str
    relation: tuple[str, str, str]
    color: str
    item: str

    @property
    def text(self) -> str:
        return f"{self.name} {self.relation[1]} {article(self.color)} {self.item}."

    @property
    def denied(self) -> str:
        return f"{self.name} does not {self.relation[0]} {article(self.color)} {self.item}."


def facts(rng: Random, lexicon: Lexicon, count: int) -> list[Fact]:
    """Facts about different people, things and colors."""
    names, items = lexicon.people(count), lexicon.words("item", count)
    colors = lexicon.words("color", count)
    return [Fact(n, lexicon.relation(), c, i) for n, c, i in zip(names, colors, items, strict=True)]


def yesno(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """A question about one of one or two facts, each stated or denied; class 1 asks for a stated one."""
    known = facts(rng, lexicon, rng.choice((1, 1, 1, 2)))
    target = rng.choice(known)
    true = [bool(label) if fact is target else rng.random() < 0.5 for fact in known]
    passage = " ".join(fact.text if said else fact.denied for fact, said in zip(known, true, strict=True))
    return {"passage": passage, "question": f"Does {target.name} {target.relation[0]} {article(target.item)}?"}


def bound(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """A question about two or three facts; class 1 asks about a stated fact.

    Class 0 asks about a thing that another person in the passage has, or (half of the time) about one that nobody has.
    """
    known = facts(rng, lexicon, rng.choice((2, 2, 3)))
    target = rng.choice(known)
    item = target.item
    if not label and rng.random() < 0.5:
        item = rng.choice([fact.item for fact in known if fact is not target])
    elif not label:
        while item in [fact.item for fact in known]:
            item = lexicon.word("item")
    question = f"Does {target.name} {target.relation[0]} {article(item)}?"
    return {"passage": " ".join(fact.text for fact in known), "question": question}


def stated(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """Like :func:`bound`, but with one or two facts; class 0 asks about a thing that nobody has."""
    known = facts(rng, lexicon, rng.choice((1, 2)))
    target = rng.choice(known)
    item = target.item
    while not label and item in [fact.item for fact in known]:
        item = lexicon.word("item")
    question = f"Does {target.name} {target.relation[0]} {article(item)}?"
    return {"passage": " ".join(fact.text for fact in known), "question": question}


def entailment(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """Premise and hypothesis; class 0 follows, 1 is left open, 2 conflicts."""
    name, _ = lexicon.people(2)
    if rng.random() < 0.5:
        state, opposite = lexicon.opposites()
        thing, second = lexicon.words("item", 2)
        premise = f"The {lexicon.word('color')} {thing} of {name} is {state}."
        hypothesis = (
            f"The {thing} is {state}.",
            f"The {second} is {rng.choice((state, lexicon.opposites()[0]))}.",
            f"The {thing} is {opposite}." if rng.random() < 0.5 else f"The {thing} is not {state}.",
        )[label]
    else:
        fact = Fact(name, lexicon.relation(), lexicon.word("color"), lexicon.word("item"))
        base, third, _ = fact.relation
        premise = f"{fact.text[:-1]} in {lexicon.word('city')}."
        unknown = lexicon.word(rng.choice(("animal", "fruit", "music")))
        hypothesis = (
            f"{name} {third} {article(fact.item)}.",
            f"{name} {third} {article(unknown)}.",
            f"{name} does not {base} {article(fact.item)}.",
        )[label]
    return {"premise": premise, "hypothesis": hypothesis}


_TOPICS = ("color", "animal", "fruit", "job", "weather", "music", "sport", "city")


def category(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """One word of a category."""
    return {"word": lexicon.word(_TOPICS[label])}


def topic(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """A sentence with one word of a topic."""
    word, name = lexicon.word(_TOPICS[label]), lexicon.people(1)[0]
    text = rng.choice(
        (
            f"{name} spoke about {word} {lexicon.word('filler')}.",
            f"The {lexicon.word('thing')} of {name} is about {word}.",
            f"{lexicon.word('filler').capitalize()} {name} thinks of {word}.",
        )
    )
    return {"sentence": text}


def polarity(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """One word that is good or bad."""
    return {"word": lexicon.word("good" if label else "bad")}


def same(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """Two words; class 1 repeats one."""
    kind = rng.choice(("item", "color", "animal", "fruit"))
    first, second = lexicon.words(kind, 2)
    return {"first": first, "second": first if label else second}


def mentioned(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """A list and a word; in class 1 the list contains it."""
    kind = rng.choice(("item", "color", "animal", "fruit"))
    *listed, absent = lexicon.words(kind, rng.choice((3, 4)))
    return {"list": " ".join(listed), "word": rng.choice(listed) if label else absent}


def opposite(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """Two states; class 0 the same, 1 unrelated, 2 opposites."""
    first, second = lexicon.opposites()
    third = first
    while third in (first, second):
        third = lexicon.opposites()[0]
    return {"first": first, "second": (first, third, second)[label]}


def larger(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """Two numbers below 50; class 1 has the larger one first."""
    low, high = sorted(rng.sample(range(50), 2))
    return {"first": str(high if label else low), "second": str(low if label else high)}


def negated(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """A statement; class 1 is negated."""
    base, third, _ = lexicon.relation()
    verb = f"does not {base}" if label else third
    return {"sentence": f"{lexicon.people(1)[0]} {verb} {article(lexicon.word('color'))} {lexicon.word('item')}."}


def tense(rng: Random, lexicon: Lexicon, label: int) -> Columns:
    """A statement in the present (0), the past (1) or the future (2)."""
    base, third, past = lexicon.relation()
    verb = (third, past, f"will {base}")[label]
    return {"sentence": f"{lexicon.people(1)[0]} {verb} {article(lexicon.word('color'))} {lexicon.word('item')}."}


_WORD = ("{word} ->", "Word: {word}\nLabel:", "Input: {word}\nOutput:", "{word} :")
_PAIR = ("{first} {second} ->", "Pair: {first}, {second}\nLabel:", "Input: {first} {second}\nOutput:")
_TEXT = ("Text: {sentence}\nLabel:", "Input: {sentence}\nOutput:", "{sentence} ->", "Sentence: {sentence}\nAnswer:")
_STATED = (("false", "true"), ("wrong", "correct"))
_QUESTION = (
    "{passage}\nQuestion: {question}\nAnswer:",
    "Passage: {passage}\nQuestion: {question}\nLabel:",
    "Input: {passage} {question}\nOutput:",
)

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sentiment",
            ("bad", "good"),
            (("bad", "good"), ("thumbs down", "thumbs up")),
            ("Review: {sentence}\nSentiment:", *_TEXT),
            sentiment,
        ),
        Family("yesno", ("denied", "stated"), _STATED, ("Question: {question}\nText: {passage}\nAnswer:",), yesno),
        Family("bound", ("not stated", "stated"), _STATED, _QUESTION, bound),
        Family("stated", ("not stated", "stated"), _STATED, _QUESTION, stated),
        Family(
            "entailment",
            ("follows", "open", "conflicts"),
            (("follows", "unknown", "conflicts"), ("sure", "maybe", "never")),
            (
                "Premise: {premise}\nHypothesis: {hypothesis}\nRelation:",
                "Text: {premise}\nClaim: {hypothesis}\nLabel:",
                "Input: {premise} {hypothesis}\nOutput:",
            ),
            entailment,
        ),
        Family("category", _TOPICS, (_TOPICS,), _WORD, category),
        Family("topic", _TOPICS, (_TOPICS,), ("Sentence: {sentence}\nTopic:", *_TEXT), topic),
        Family("polarity", ("bad", "good"), (("bad", "good"),), _WORD, polarity),
        Family("same", ("different", "same"), (("different", "same"), ("false", "true")), _PAIR, same),
        Family(
            "mentioned",
            ("absent", "listed"),
            (("absent", "listed"), ("false", "true")),
            ("List: {list}\nWord: {word}\nLabel:", "Input: {list} | {word}\nOutput:", "{list} | {word} ->"),
            mentioned,
        ),
        Family("opposite", ("same", "other", "opposite"), (("same", "other", "opposite"),), _PAIR, opposite),
        Family("larger", ("second", "first"), (("less", "more"),), _PAIR, larger),
        Family("negated", ("plain", "negated"), (("plain", "negated"),), _TEXT, negated),
        Family("tense", ("present", "past", "future"), (("now", "before", "later"),), _TEXT, tense),
    )
}
