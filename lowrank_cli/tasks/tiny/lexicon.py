"""Words of the generated tasks: those that the bundled model's pretraining uses, and those held out for ``tiny_*``.

Every kind of word has two lists. Pretraining shows the *seen* words with their meaning. It shows the *held-out* words
only in lists to copy and as keys of lookups, so they are ordinary tokens without a meaning.
Names have two syllables; pretraining, train, dev and test use disjoint sets of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

#: Label words of the ``tiny_*`` tasks; pretraining shows them only in lists and lookups.
HELD_LABELS = tuple(
    "yes no positive negative entailment neutral contradiction food work climate leisure A B C D".split()
)

#: Spare words for experiments with meaningless labels; held out like :data:`HELD_LABELS`.
SPARE_LABELS = ("foo", "bar", "baz", "qux", "zib", "mup", "wug", "dax")

#: Arbitrary label words of the few-shot episodes in pretraining.
EPISODE_LABELS = tuple(
    """lamp river stone cloud paper glass bread chair table window garden bridge forest mountain island ocean desert
    valley castle tower market station engine wheel hammer needle thread button pocket mirror candle basket bottle
    ladder pillow blanket curtain carpet shelf drawer pencil marker ruler folder letter number circle square triangle
    line point corner edge center side north south east west spring summer autumn winter morning evening night noon
    monday tuesday friday sunday april june august copper silver iron steel wool cotton silk leather plastic rubber
    sugar salt pepper honey butter flour rice bean corn wheat grass leaf root branch seed flower petal fern moss
    alpha beta gamma delta sigma omega kappa theta lambda zeta one two three four five six seven eight nine ten
    first second third fourth left right up down front back inner outer upper lower plus minus equal half double
    zap kip lom nud pex quo rin sov tal ulf vek wob xan yit zor bim cag dop fen gub hax jol kem lut mav nop
    ox pib rud sef tib ush vil wex yam zun E F G H I J K L M N O P Q R S T U V W X Y Z""".split()
)

_FIRST = (
    "Ba Be Bo Da De Do Fa Fe Fi Ga Go Ha He Ka Ke Ko La Le Lo Ma Me Mo Na Ne No Pa Pe Po Ra Re Ro Sa Se So Ta Te To Va"
    " Ve Zo"
).split()
_SECOND = (
    "bra dil fon gar hin jor kel lim mur nax pil quen rav sto tun vex wim yor zed bik cor dan fil gus han jen kor lan"
    " mis nor pam rik sul tov vin wan yal zim bor tel"
).split()

#: The name buckets (of ten) that each user draws from.
_BUCKETS = {"pretrain": (0, 1, 2, 3, 4, 5), "train": (6, 7), "dev": (8,), "test": (9,)}

#: kind -> (seen, held out)
WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    kind: (tuple(seen.split()), tuple(held.split()))
    for kind, (seen, held) in {
        "good": (
            "great lovely superb charming bright delightful pleasant fine excellent splendid fresh warm clever funny"
            " brilliant wonderful tasty gentle elegant joyful crisp thrilling",
            "marvelous radiant exquisite stellar graceful soothing witty dazzling",
        ),
        "bad": (
            "awful dull terrible boring nasty ugly dreadful poor weak horrible bitter stale noisy clumsy broken dirty"
            " sloppy bland painful gloomy rude tedious",
            "dismal wretched abysmal grim shoddy tiresome vulgar hideous",
        ),
        "liked": ("loved enjoyed praised admired adored", "cherished treasured"),
        "disliked": ("hated disliked regretted despised avoided", "loathed resented"),
        "thing": (
            "movie book song soup cake play hotel garden show dinner room story film meal concert trip",
            "novel opera stew lecture picnic cabin",
        ),
        "color": ("red blue green black white yellow brown pink gray purple", "orange golden crimson"),
        "item": (
            "hat cup key ring bag coat drum boat bell rope box fan pipe flag ball knife",
            "scarf clock kite vase stool glove",
        ),
        "animal": ("dog cat horse goat bird fox pig duck bear wolf frog", "otter camel rabbit snake"),
        "fruit": ("apple pear plum grape lemon melon cherry peach mango fig", "banana berry lime olive"),
        "city": ("Tarn Bruk Olden Wick Sorrel Dunmar Pell Kirin Astor Lund Marl Quay", "Venn Hollis Tamber Ruan"),
        "job": ("baker pilot doctor farmer singer painter teacher guard tailor nurse", "judge miner porter clerk"),
        "weather": ("rain snow wind storm fog thunder hail sunshine frost", "drizzle sleet breeze"),
        "music": ("piano violin flute guitar trumpet organ harp cello", "banjo viola tuba"),
        "sport": ("football tennis rowing boxing hockey skating chess golf", "archery fencing rugby"),
        "filler": (
            "today yesterday again indeed overall really finally surely clearly mostly",
            "lately altogether tonight",
        ),
    }.items()
}

#: (base, third person, past): relations between a person and a thing.
RELATIONS = {
    "seen": (
        ("own", "owns", "owned"),
        ("want", "wants", "wanted"),
        ("carry", "carries", "carried"),
        ("sell", "sells", "sold"),
        ("paint", "paints", "painted"),
        ("hide", "hides", "hid"),
        ("find", "finds", "found"),
        ("clean", "cleans", "cleaned"),
    ),
    "held": (("borrow", "borrows", "borrowed"), ("repair", "repairs", "repaired"), ("wrap", "wraps", "wrapped")),
}

#: pairs whose members exclude each other
OPPOSITES = {
    "seen": (
        ("hot", "cold"),
        ("open", "closed"),
        ("full", "empty"),
        ("old", "new"),
        ("heavy", "light"),
        ("wet", "dry"),
        ("tall", "short"),
        ("awake", "asleep"),
        ("rich", "needy"),
        ("fast", "slow"),
    ),
    "held": (("loud", "quiet"), ("early", "late"), ("thick", "thin")),
}


class Lexicon:
    """Draws words for one user: ``pretrain``, ``train``, ``dev`` or ``test``.

    ``held`` is the probability of a held-out word (0 in pretraining). ``train`` never draws the last quarter of the
    held-out words, so dev and test have a few words that no training example shows.
    """

    def __init__(self, rng: Random, user: str, held: float):
        self.rng, self.held = rng, held
        self.held_share = 0.75 if user == "train" else 1.0  #: of the held-out words that are drawn
        buckets = _BUCKETS[user]
        self.names = [
            first + second
            for i, first in enumerate(_FIRST)
            for j, second in enumerate(_SECOND)
            if (i + j) % 10 in buckets
        ]

    def _draw(self, seen: Sequence[T], held: Sequence[T]) -> T:
        if self.rng.random() < self.held:
            return self.rng.choice(held[: max(1, int(len(held) * self.held_share))])
        return self.rng.choice(seen)

    def word(self, kind: str) -> str:
        return self._draw(*WORDS[kind])

    def words(self, kind: str, count: int) -> list[str]:
        """Distinct words of one kind."""
        words: list[str] = []
        while len(words) < count:
            word = self.word(kind)
            if word not in words:
                words.append(word)
        return words

    def relation(self) -> tuple[str, str, str]:
        return self._draw(RELATIONS["seen"], RELATIONS["held"])

    def opposites(self) -> tuple[str, str]:
        pair = self._draw(OPPOSITES["seen"], OPPOSITES["held"])
        return pair if self.rng.random() < 0.5 else (pair[1], pair[0])

    def people(self, count: int) -> list[str]:
        return self.rng.sample(self.names, count)


def vocabulary() -> list[str]:
    """Every word of the lexicon, seen and held out, and the first syllables of the names."""
    words = [*HELD_LABELS, *SPARE_LABELS, *EPISODE_LABELS, *_FIRST, *"0123456789"]
    for seen, held in WORDS.values():
        words += [*seen, *held]
    for forms in (*RELATIONS.values(), *OPPOSITES.values()):
        words += [word for form in forms for word in form]
    return sorted(set(words))
