"""Generated examples whose answer is a text: options, numbers, sentences, instructions.

``plain`` wordings are for the bundled model's pretraining, the others for the ``tiny_*`` tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from lowrank_cli.tasks.tiny.families import FAMILIES, article, facts
from lowrank_cli.tasks.tiny.lexicon import Lexicon

Row = dict[str, Any]  #: columns of an example


def choice(rng: Random, lexicon: Lexicon, label: int, options: int = 4) -> Row:
    """For pretraining: a question about stated facts with ``options`` choices; number ``label`` is right.

    In half of the questions one of the wrong choices belongs to the second person.
    """
    known = facts(rng, lexicon, 2)
    fact, other = rng.sample(known, 2)
    if rng.random() < 0.7:
        kind, right, distractor = "item", fact.item, other.item
        question = f"What does {fact.name} {fact.relation[0]}?"
    else:
        kind, right, distractor = "color", fact.color, other.color
        question = f"Which color is the {fact.item}?"
    wrong = [word for word in lexicon.words(kind, options + 1) if word not in (right, distractor)][: options - 1]
    if rng.random() < 0.5:
        wrong[0] = distractor
    rng.shuffle(wrong)
    choices = [*wrong[:label], right, *wrong[label:]]
    return {"passage": " ".join(fact.text for fact in known), "question": question, "choices": choices, "answer": label}


#: kind of word -> its name in a question
KINDS = {
    "animal": "an animal",
    "fruit": "a fruit",
    "city": "a town",
    "job": "a job",
    "sport": "a sport",
    "weather": "a kind of weather",
    "music": "an instrument",
}


def category_question(rng: Random, lexicon: Lexicon, label: int, options: int = 4) -> Row:
    """A choice between ``options`` words of different kinds; number ``label`` is of the kind in the question."""
    kinds = rng.sample(list(KINDS), options)
    name = lexicon.people(1)[0]
    question = f"{name} picked {KINDS[kinds[label]]}. What did {name} pick?"
    return {"question": question, "choices": [lexicon.word(kind) for kind in kinds], "answer": label}


def number_problem(rng: Random, lexicon: Lexicon, low: int, high: int, plain: bool) -> Row:
    """Addition or subtraction of a one-digit number; all numbers are in ``low … high - 1``."""
    step = rng.randrange(1, 10)
    more = rng.random() < 0.5
    start = rng.randrange(low, high - step) if more else rng.randrange(low + step, high)
    name, thing = lexicon.people(1)[0], lexicon.word("item")
    if plain:
        gets, loses = f"gets {step} more", f"loses {step}"
    else:
        gets = rng.choice((f"buys {step} more", f"receives {step} from {lexicon.people(1)[0]}"))
        loses = rng.choice((f"gives {step} to {lexicon.people(1)[0]}", f"throws {step} away"))
    question = f"{name} has {start} {thing}s and {gets if more else loses}. How many {thing}s has {name} now?"
    return {"question": question, "answer": str(start + step if more else start - step)}


def description(rng: Random, lexicon: Lexicon) -> Row:
    """Attributes and a sentence that states them; its form depends on which attributes there are."""
    name = lexicon.people(1)[0]
    fields = {
        "name": name,
        "job": lexicon.word("job"),
        "city": lexicon.word("city"),
        "likes": lexicon.word(rng.choice(("music", "sport", "fruit"))),
        "has": f"{lexicon.word('color')} {lexicon.word('item')}",
    }
    dropped = rng.sample(("job", "city", "likes", "has"), rng.choice((1, 2)))
    fields = {key: value for key, value in fields.items() if key not in dropped}
    text = f"{name} is {article(fields['job'])}" if "job" in fields else f"There is someone called {name}"
    if "city" in fields:
        text += f" from the town of {fields['city']}"
    extra = [f"enjoys {fields['likes']}"] if "likes" in fields else []
    extra += [f"keeps {article(fields['has'])}"] if "has" in fields else []
    text += f" who {' and '.join(extra)}." if extra else "."
    return {"attributes": ", ".join(f"{key}[{value}]" for key, value in fields.items()), "sentence": text}


def _listed(rng: Random, lexicon: Lexicon, count: int) -> list[str]:
    return lexicon.words(rng.choice(("item", "color", "animal", "fruit")), count)


def _pick(position: int) -> Callable[[Random, Lexicon], tuple[str, str]]:
    def make(rng: Random, lexicon: Lexicon) -> tuple[str, str]:
        words = _listed(rng, lexicon, rng.choice((3, 4)))
        return " ".join(words), words[position]

    return make


def _reverse(rng: Random, lexicon: Lexicon) -> tuple[str, str]:
    words = _listed(rng, lexicon, 3)
    return " ".join(words), " ".join(reversed(words))


def _opposite(rng: Random, lexicon: Lexicon) -> tuple[str, str]:
    state, opposite = lexicon.opposites()
    return f"The {lexicon.word('item')} of {lexicon.people(1)[0]} is {state}.", opposite


def _larger(rng: Random, lexicon: Lexicon) -> tuple[str, str]:
    pair = rng.sample(range(10, 50), 2)
    return " ".join(map(str, pair)), str(max(pair))


def _color_of(rng: Random, lexicon: Lexicon) -> tuple[str, str]:
    known = facts(rng, lexicon, 2)
    return " ".join(fact.text for fact in known) + f" {known[0].item}", known[0].color


def _owner_of(rng: Random, lexicon: Lexicon) -> tuple[str, str]:
    known = facts(rng, lexicon, 2)
    return " ".join(fact.text for fact in known) + f" {known[1].item}", known[1].name


def _opinion(rng: Random, lexicon: Lexicon) -> tuple[str, str]:
    label = rng.randrange(2)
    return FAMILIES["sentiment"].make(rng, lexicon, label)["sentence"], ("bad", "good")[label]


#: name -> (short wording in pretraining, wording in ``tiny_instruct``, function that makes input and answer)
INSTRUCTIONS: dict[str, tuple[str, str, Callable[[Random, Lexicon], tuple[str, str]]]] = {
    "first": ("first", "Give the word that starts the list.", _pick(0)),
    "second": ("second", "Give the word after the starting one.", _pick(1)),
    "last": ("last", "Give the word that ends the list.", _pick(-1)),
    "reverse": ("reverse", "Write the list from its end to its start.", _reverse),
    "opposite": ("opposite", "Name the state that excludes the one given.", _opposite),
    "larger": ("larger", "Repeat the greater number.", _larger),
    "color": ("color", "Tell the color of the thing named at the end.", _color_of),
    "owner": ("owner", "Tell who goes with the thing named at the end.", _owner_of),
    "opinion": ("opinion", "Tell what the writer thinks in one word.", _opinion),
}


def instruction(rng: Random, lexicon: Lexicon, name: str, plain: bool) -> Row:
    """One instruction with its input and answer."""
    short, long, make = INSTRUCTIONS[name]
    given, answer = make(rng, lexicon)
    return {"instruction": short if plain else long, "input": given, "answer": answer}
