"""The generated tasks: same seed, same rows; answers right by rules of their own; nothing held out leaks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from lowrank_cli.errors import UserError
from lowrank_cli.tasks import tiny
from lowrank_cli.tasks.tiny import answers, lexicon

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bundled_model"))

import pretrain_text  # noqa: E402

SMALL = {"train": 400, "dev": 80, "test": 160}
CAPITALISED = re.compile(r"\b[A-Z][a-z]{4,}\b")
ALL_NAMES = {first + second for first in lexicon._FIRST for second in lexicon._SECOND}


@pytest.fixture(scope="module", params=tiny.NAMES)
def task(request):
    return request.param, tiny.generate(request.param, sizes=SMALL)


def every_row(data):
    return [row for split in ("train", "dev", "test") for row in data[split]]


def names_of(rows):
    return {word for row in rows for text in row.values() for word in CAPITALISED.findall(str(text))} & ALL_NAMES


def test_same_seed_same_rows_other_seed_others(task):
    name, data = task
    assert tiny.generate(name, sizes=SMALL) == data
    assert tiny.generate(name, seed=1, sizes=SMALL) != data


def test_sizes(task):
    name, data = task
    assert {split: len(rows) for split, rows in data.items()} == SMALL
    assert {split: len(rows) for split, rows in tiny.generate(name).items()} == {"train": 2048, "dev": 256, "test": 512}


def test_no_row_twice_and_no_name_in_two_splits(task):
    _, data = task
    assert len({repr(row) for row in every_row(data)}) == sum(SMALL.values())
    names = {split: names_of(rows) for split, rows in data.items()}
    assert names["train"] and names["test"]
    assert not names["train"] & names["test"] and not names["train"] & names["dev"] and not names["dev"] & names["test"]


def test_rows_hold_words_of_both_kinds(task):
    """Words without a meaning in pretraining stand in a good share of the rows, not in all."""
    name, data = task
    held = {word for kind in lexicon.WORDS.values() for word in kind[1]}
    for forms in (lexicon.RELATIONS["held"], lexicon.OPPOSITES["held"]):
        held |= {word for form in forms for word in form}
    held |= {f"{word}s" for word in held}
    texts = [" ".join(str(value) for value in row.values()) for row in data["train"]]
    share = sum(bool(held & set(re.findall(r"\w+", text))) for text in texts)
    assert 0.2 < share / len(texts) < 1, name


@pytest.mark.parametrize(
    ("name", "column", "classes"),
    [
        ("tiny_yesno", "label", 2),
        ("tiny_sentiment", "label", 2),
        ("tiny_entailment", "label", 3),
        ("tiny_choice", "answer", 4),
    ],
)
def test_classes_are_balanced(name, column, classes):
    for rows in tiny.generate(name, sizes=SMALL).values():
        counts = Counter(row[column] for row in rows)
        assert sorted(counts) == list(range(classes))
        assert max(counts.values()) - min(counts.values()) <= 1


FACT = re.compile(r"(\w+) (\w+) an? (\w+) (\w+)\.")


def test_yesno_answers():
    for row in every_row(tiny.generate("tiny_yesno", sizes=SMALL)):
        known = {(name, item) for name, _, _, item in FACT.findall(row["passage"])}
        name, item = re.fullmatch(r"Does (\w+) \w+ an? (\w+)\?", row["question"]).groups()
        assert ((name, item) in known) == bool(row["label"]), row


def test_choice_answers():
    for row in every_row(tiny.generate("tiny_choice", sizes=SMALL)):
        (asked,) = re.fullmatch(r"\w+ picked (.*)\. What did \w+ pick\?", row["question"]).groups()
        (kind,) = (kind for kind, named in answers.KINDS.items() if named == asked)
        words = {word for part in lexicon.WORDS[kind] for word in part}
        assert [word in words for word in row["choices"]] == [i == row["answer"] for i in range(4)], row


def test_sentiment_answers():
    good, bad = (
        {word for kind in kinds for part in lexicon.WORDS[kind] for word in part}
        for kinds in (("good", "liked"), ("bad", "disliked"))
    )
    for row in every_row(tiny.generate("tiny_sentiment", sizes=SMALL)):
        last = re.split(r" but |, then ", row["sentence"])[-1]
        words = set(re.findall(r"[a-z]+", last.lower()))
        assert bool(words & good) == bool(row["label"]), row
        assert bool(words & bad) != bool(row["label"]), row


def test_entailment_answers():
    against = {}
    for pairs in lexicon.OPPOSITES.values():
        for first, second in pairs:
            against |= {first: second, second: first}
    for row in every_row(tiny.generate("tiny_entailment", sizes=SMALL)):
        premise, hypothesis = re.findall(r"\w+", row["premise"]), re.findall(r"\w+", row["hypothesis"])
        content = set(hypothesis) - {"The", "is", "not", "does", "a", "an"}
        if premise[0] == "The":  # The COLOR THING of NAME is STATE
            if hypothesis[1] != premise[2]:
                right = 1
            elif "not" in hypothesis or hypothesis[-1] == against[premise[-1]]:
                right = 2
            else:
                right = 0
        else:
            right = 2 if "not" in hypothesis else 0 if content <= set(premise) else 1
        assert right == row["label"], row


def test_arithmetic_answers_and_range():
    for row in every_row(tiny.generate("tiny_arithmetic", sizes=SMALL)):
        start, step = map(int, re.findall(r"\d+", row["question"]))
        sign = 1 if re.search("buys|receives", row["question"]) else -1
        assert int(row["answer"]) == start + sign * step, row
        assert 50 <= start < 80 and 50 <= int(row["answer"]) < 80 and 1 <= step <= 9


def test_descriptions_say_every_attribute_and_no_other_names():
    for row in every_row(tiny.generate("tiny_data2text", sizes=SMALL)):
        for value in re.findall(r"\[([^\]]+)\]", row["attributes"]):
            assert value in row["sentence"], row
        assert row["sentence"].endswith(".")


def test_instruction_answers():
    seen = Counter()
    for row in every_row(tiny.generate("tiny_instruct", sizes=SMALL)):
        words, answer = row["input"].split(), row["answer"]
        task = row["instruction"]
        seen[task] += 1
        if "starts" in task:
            assert answer == words[0]
        elif "after the starting" in task:
            assert answer == words[1]
        elif "ends the list" in task:
            assert answer == words[-1]
        elif "from its end" in task:
            assert answer.split() == words[::-1]
        elif "greater" in task:
            assert int(answer) == max(map(int, words))
        elif "color" in task or "who goes" in task:
            known = {item: (name, color) for name, _, color, item in FACT.findall(row["input"])}
            assert answer == known[words[-1]]["who" not in task], row
        elif "writer" in task:
            assert answer in ("good", "bad")
        else:
            pair = {words[-1].rstrip("."), answer}
            assert any(pair == set(known) for pairs in lexicon.OPPOSITES.values() for known in pairs), row
    assert len(seen) == 9 and max(seen.values()) - min(seen.values()) <= 3


def test_pretraining_never_gives_held_out_words_a_meaning():
    """Outside lists to be copied, neither held-out label words, content words, names nor numbers occur."""
    rng = Random(0)
    words = lexicon.Lexicon(rng, "pretrain", 0.0)
    held = {word for seen, out in lexicon.WORDS.values() for word in out if word not in seen}
    held |= {form for forms in lexicon.RELATIONS["held"] for form in forms}
    held |= {word for pair in lexicon.OPPOSITES["held"] for word in pair}
    answers: set[str] = set()
    for kind in pretrain_text.MIXTURE:
        if kind in ("copy", "lookup"):
            continue
        for _ in range(150):
            pieces = getattr(pretrain_text, f"_{kind}")(rng, words, 1.0)
            text = "".join(piece for piece, _ in pieces)
            answers |= {piece.strip() for piece, weight in pieces if weight == pretrain_text.ANSWER}
            assert not held & set(re.findall(r"[A-Za-z]+", text)), text
            assert all(int(number) < 100 for number in re.findall(r"\d+", text))
            if kind == "arithmetic":
                assert all(int(number) < 50 for number in re.findall(r"\d+", text)), text
    assert not answers & {*lexicon.HELD_LABELS, *lexicon.SPARE_LABELS}
    assert len(answers & set(lexicon.EPISODE_LABELS)) > 100
    assert not names_of(every_row(tiny.generate("tiny_sentiment", sizes=SMALL))) & set(words.names)


def test_label_pools_are_disjoint():
    assert not set(lexicon.EPISODE_LABELS) & {*lexicon.HELD_LABELS, *lexicon.SPARE_LABELS}
    assert len(set(lexicon.EPISODE_LABELS)) == len(lexicon.EPISODE_LABELS)


def test_unknown_name_suggests():
    with pytest.raises(UserError, match="tiny_yesno"):
        tiny.generate("tiny_yesn")


def test_import_stays_light():
    code = "import sys, lowrank_cli.tasks.tiny; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
