"""Metrics: their values, their normalisation, and that they touch neither network nor cache."""

from __future__ import annotations

import os
from pathlib import Path

import evaluate
import pytest
from command import lrk, one_line  # noqa: F401 (a fixture)

from lowrank_cli.errors import UserError
from lowrank_cli.schema import METRICS as SCHEMA
from lowrank_cli.tasks import metrics
from lowrank_cli.tasks.entities import entities
from lowrank_cli.tasks.metrics import METRICS, compute, correct

GSM = r"####\s*\$?(-?[\d,]*\.?\d+)"

WORDS = ("no", "yes")


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "value"),
    [
        ("accuracy", "yes", "yes", 1),
        ("accuracy", " yes\n", "yes", 1),
        ("accuracy", "Yes", "yes", 0),
        ("exact_match", "The  Red\nhouse ", "the red house", 1),
        ("exact_match", "the red houses", "the red house", 0),
        ("exact_match", "b", ("a", "B"), 1),
        ("exact_match", "", "a", 0),
        ("number_match", "it makes 1,000.0 in all", "1000", 1),
        ("number_match", "3 and then 4", "4", 1),
        ("number_match", "-4", "4", 0),
        ("number_match", "10-4", "4", 1),
        ("number_match", "10 is more than -4", "-4", 1),
        ("number_match", "1-.5", "0.5", 1),
        ("number_match", ".50", "0.5", 1),
        ("number_match", "18.", "18", 1),
        ("number_match", "none", "none", 0),
        ("number_match", "7", ("6", "7"), 1),
    ],
)
def test_shares(name, prediction, reference, value):
    assert compute(name, [prediction], [reference]) == {name: value}


def test_shares_are_means():
    assert compute("accuracy", ["a", "b", "c", "d"], ["a", "x", "x", "d"]) == {"accuracy": 0.5}


def test_macro_f1_is_the_mean_over_labels():
    guesses, truths = ["a", "a", "a ", "b", "c", "a"], ["a", "a", "b", "b", "a", "a"]
    expected = (2 * 3 / (4 + 4) + 2 * 1 / (1 + 2) + 0 / (1 + 0)) / 3  # a, b, and c, which is never right
    assert compute("macro_f1", guesses, truths) == {"macro_f1": pytest.approx(expected)}
    assert correct("macro_f1", guesses, truths) is None


@pytest.mark.parametrize(
    ("prediction", "value"),
    [("2 + 2\n#### 1,234", 1), ("#### 9\n#### $1234.00", 1), ("1234", 0), ("#### x", 0), ("", 0)],
)
def test_extract_takes_the_last_match(prediction, value):
    assert compute("number_match", [prediction], ["steps\n#### 1,234"], extract=GSM) == {"number_match": value}


def test_extract_without_group_takes_the_match():
    assert compute("exact_match", ["so yes or no"], ["no"], extract="yes|no") == {"exact_match": 1.0}


def test_bleu_is_that_of_sacrebleu_with_unlike_numbers_of_references():
    import sacrebleu

    guesses = ["the cat sat on the mat today", "a dog ran in the park"]
    references = [("the cat sat on a mat today", "a cat was on the mat"), ("a dog ran in a park",)]
    expected = sacrebleu.corpus_bleu(guesses, [[texts[0] for texts in references], [references[0][1], None]])
    found = compute("bleu", guesses, references)["bleu"]
    assert found == pytest.approx(expected.score) and 30 < found < 90
    assert compute("bleu", guesses, guesses)["bleu"] == pytest.approx(100)


class NoSynonyms:
    """WordNet, which is not on every machine, without a word."""

    @staticmethod
    def synsets(word: str) -> list:
        return []


def test_meteor_matches_words_and_stems_and_takes_the_best_reference(monkeypatch):
    monkeypatch.setattr(metrics, "_wordnet", lambda: NoSynonyms)
    one = 1 - 0.5 / 4**3  # all of four words match, in one chunk
    assert compute("meteor", ["the cats sat down"], [("x", "the cat sat down")])["meteor"] == pytest.approx(one)
    assert compute("meteor", ["the cat sat down", ""], ["the cat sat down", "z"])["meteor"] == pytest.approx(one / 2)


def test_meteor_without_wordnet_is_refused_before_the_work(lrk, monkeypatch):  # noqa: F811
    monkeypatch.setattr("nltk.data.path", [])
    ended = lrk("check", "evaluate", "method=none", "task.metric=meteor")
    assert one_line(ended).startswith("task.metric: meteor needs WordNet, which this downloads: python -m nltk.")


def test_rouge_l_takes_the_best_reference():
    # "a b d" against "a b c d": longest common subsequence 3, precision 3/3, recall 3/4, F = 6/7
    assert compute("rouge_l", ["a b d"], [("x y", "a b c d")])["rouge_l"] == pytest.approx(6 / 7)
    assert compute("rouge_l", ["a b", "q"], ["a b", "z"])["rouge_l"] == pytest.approx(0.5)


def test_all_are_evaluate_metrics():
    assert all(issubclass(metric, evaluate.Metric) for metric in METRICS.values())


def test_unknown_metric():
    with pytest.raises(UserError, match=r"^metric: unknown value 'acuracy'; did you mean 'accuracy'"):
        compute("acuracy", ["a"], ["a"])


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    for name in ("work", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    home = Path(os.environ["HF_HOME"])
    before = sorted(home.rglob("*"))
    for name in METRICS.keys() - {"meteor"}:  # WordNet is not in the package
        compute(name, ["1"], ["1"], labels=WORDS)
    assert sorted(home.rglob("*")) == before
    assert not list(tmp_path.glob("*/*"))


def test_correct_answers_are_those_that_a_share_counts():
    references = [["4"], ["so 5"], ["6", "7"]]
    for name in ("accuracy", "exact_match", "number_match"):
        right = correct(name, ["4 ", "is 5", "7"], references)
        assert sum(right) / 3 == compute(name, ["4 ", "is 5", "7"], references)[name]
    assert correct("number_match", ["4 ", "is 5", "7"], references) == [True, True, True]
    assert correct("accuracy", ["A: 4", "x", "7"], references, extract=r"\d") == [True, False, True]
    assert correct("bleu", ["4"], [["4"]]) is None


def test_every_metric_of_the_schema_is_computed_here_and_within_its_range(monkeypatch):
    monkeypatch.setattr(metrics, "_wordnet", lambda: NoSynonyms)
    assert METRICS.keys() == SCHEMA.keys() - {"mean"}
    texts = {"number": ("2.5", "4"), "tags": ("B-X I-X", "O B-X"), "free": ("so it is 1 now", "2")}
    texts |= {"labels": WORDS, "multi_label": WORDS}
    for name in METRICS:
        about, first, other = SCHEMA[name], *texts[next(kind for kind in texts if kind in SCHEMA[name].answers)]
        values = [
            compute(name, guesses, [first, other], labels=WORDS)[name]
            for guesses in ([first, other], [other, first], [first, first])
        ]
        assert all(value >= about.low and (about.high is None or value <= about.high + 1e-9) for value in values), name
        right, wrong, _ = values
        assert (right > wrong) == about.higher_is_better and right != wrong, name


@pytest.mark.parametrize(
    ("guess", "texts", "em", "f1"),
    [
        ("The Eiffel-Tower!", ["eiffeltower"], 1, 1),
        ("in the old town", ["Old Town", "a town"], 0, 0.8),
        ("", ["a"], 1, 1),  # an article alone is nothing, as in the official script
        ("", ["town"], 0, 0),
        ("town town", ["town"], 0, 2 / 3),
    ],
)
def test_squad_compares_words(guess, texts, em, f1):
    assert compute("squad_em", [guess], [texts]) == {"squad_em": em}
    assert compute("squad_f1", [guess], [texts]) == {"squad_f1": pytest.approx(f1)}


def test_label_sets():
    guesses, truths = ["joy, love", "", "fear"], ["love", "fear", "fear, joy"]
    assert compute("micro_f1", guesses, truths)["micro_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert compute("macro_f1", guesses, truths)["macro_f1"] == pytest.approx((0 + 1 + 2 / 3) / 3)
    assert compute("accuracy", guesses, [*truths[:1], "", "fear"])["accuracy"] == pytest.approx(2 / 3)


def test_matthews_of_two_and_of_several_labels():
    """Values of scikit-learn 1.9."""
    assert compute("matthews", list("ababa"), list("abbba"))["matthews"] == pytest.approx(2 / 3)
    assert compute("matthews", list("abcabc"), list("abccba"))["matthews"] == pytest.approx(0.5)
    assert compute("matthews", list("aaaa"), list("abab"))["matthews"] == 0


def test_correlations_with_ties():
    """Values of scipy 1.17."""
    guesses, truths = ["1", "2", "2", "4"], ["0.5", "1.5", "3", "2"]
    assert compute("pearson", guesses, truths)["pearson"] == pytest.approx(0.4453993340830445)
    assert compute("spearman", guesses, truths)["spearman"] == pytest.approx(0.6324555320336759)
    assert compute("mse", guesses, truths)["mse"] == pytest.approx((0.25 + 0.25 + 1 + 4) / 4)
    assert compute("pearson", ["1", "1"], ["0", "1"])["pearson"] == 0


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-P I-P O", [("P", 1, 2)]),
        ("I-P I-P I-L", [("P", 0, 1), ("L", 2, 2)]),
        ("B-P B-P I-P", [("P", 0, 0), ("P", 1, 2)]),
        ("B-P I-L E-L I-L", [("P", 0, 0), ("L", 1, 2), ("L", 3, 3)]),
        ("S-P S-P B-L E-L O", [("P", 0, 0), ("P", 1, 1), ("L", 2, 3)]),
        ("O O", []),
    ],
)
def test_entities(tags, expected):
    assert entities(tags.split()) == expected


def test_entities_count_where_span_and_type_are_right():
    guesses, truths = ["B-P I-P O B-L", "O"], ["B-P I-P O B-P", "B-L"]
    assert compute("entity_precision", guesses, truths)["entity_precision"] == 1 / 2
    assert compute("entity_recall", guesses, truths)["entity_recall"] == 1 / 3
    assert compute("entity_f1", guesses, truths)["entity_f1"] == pytest.approx(2 / 5)
    assert compute("tag_accuracy", guesses, truths)["tag_accuracy"] == 3 / 5
