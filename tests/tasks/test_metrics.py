"""Metrics: their values, their normalisation, and that they touch neither network nor cache."""

from __future__ import annotations

import os
from pathlib import Path

import evaluate
import pytest

from lowrank_cli.errors import UserError
from lowrank_cli.tasks.metrics import METRICS, compute, correct

GSM = r"####\s*\$?(-?[\d,]*\.?\d+)"


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
    for name in METRICS:
        compute(name, ["a 1"], ["a 1"])
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
