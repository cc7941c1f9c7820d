"""Metrics as subclasses of :class:`evaluate.Metric`: no Hub, no network, only temporary files.

Importing this module imports ``evaluate``, which takes seconds: import it where a metric is computed.
:data:`lowrank_cli.schema.METRICS` has the range and the direction of each.
"""

from __future__ import annotations

import math
import re
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import datasets
import evaluate

from lowrank_cli.errors import require_choice
from lowrank_cli.tasks.entities import entities

NUMBER = re.compile(r"(?:(?<!\d)[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")  # in 10-4 the second number is 4


class _Metric(evaluate.Metric):
    """Compares each predicted string with one or more reference strings. Subclasses define ``_compute``."""

    labels: tuple[str, ...] = ()  #: the task's label words

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.List(text)})
        return evaluate.MetricInfo(
            description=self.__doc__ or "", citation="", features=features, inputs_description=""
        )


class _Share(_Metric):
    """Share of predictions that equal one of their references after normalization of both; None equals nothing."""

    normalize: Callable[[str], object]

    @classmethod
    def correct(cls, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
        return [
            cls.normalize(guess) is not None and cls.normalize(guess) in [cls.normalize(text) for text in texts]
            for guess, texts in zip(predictions, references)
        ]

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        correct = self.correct(predictions, references)
        return {self.name: sum(correct) / len(correct)}


class Accuracy(_Share):
    """Share of predictions that equal a reference, ignoring leading and trailing white space."""

    normalize = staticmethod(str.strip)


class ExactMatch(_Share):
    """Share of predictions that equal a reference, ignoring case and the amount of white space."""

    @staticmethod
    def normalize(text: str) -> str:
        return " ".join(text.casefold().split())


class NumberMatch(_Share):
    """Share of predictions whose last number has the value of a reference: ``1,000.0`` equals ``1000``."""

    @staticmethod
    def normalize(text: str) -> Decimal | None:
        numbers = NUMBER.findall(text)
        try:
            return Decimal(numbers[-1].replace(",", "")) if numbers else None
        except InvalidOperation:
            return None


def squad_words(text: str) -> list[str]:
    """The words that SQuAD compares: in lower case, without punctuation and articles."""
    letters = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


class SquadEm(_Share):
    """Share of predictions that equal a reference after SQuAD's normalization.

    Rajpurkar et al., EMNLP 2016, arXiv 1606.05250, section 6.1, with the normalization of the official script.
    """

    @staticmethod
    def normalize(text: str) -> str:
        return " ".join(squad_words(text))


class SquadF1(_Metric):
    """Mean F1 of the words that a prediction and its best reference share, after SQuAD's normalization."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        best = [max(self._f1(guess, text) for text in texts) for guess, texts in zip(predictions, references)]
        return {self.name: sum(best) / len(best)}

    @staticmethod
    def _f1(guess: str, reference: str) -> float:
        guessed, right = squad_words(guess), squad_words(reference)
        if not guessed or not right:
            return float(guessed == right)
        return 2 * (Counter(guessed) & Counter(right)).total() / (len(guessed) + len(right))


class _LabelF1(_Metric):
    """Counts, for each label, how often it is predicted, right and both; several labels have commas between them."""

    def _counts(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[Counter[str], Counter[str]]:
        """True positives, and 2 TP + FP + FN."""
        hits: Counter[str] = Counter()
        both: Counter[str] = Counter()
        for guess, texts in zip(predictions, references):
            guessed, right = (
                {label.strip() for label in text.split(",") if label.strip()} for text in (guess, texts[0])
            )
            hits.update(guessed & right)
            both.update([*guessed, *right])
        return hits, both


class MacroF1(_LabelF1):
    """Mean over the labels that are predicted or right of F1 = 2 TP / (2 TP + FP + FN), ignoring white space around."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        hits, both = self._counts(predictions, references)
        return {self.name: sum(2 * hits[label] / count for label, count in both.items()) / max(1, len(both))}


class MicroF1(_LabelF1):
    """F1 = 2 TP / (2 TP + FP + FN) with the counts of all labels added up."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        hits, both = self._counts(predictions, references)
        return {self.name: 2 * hits.total() / max(1, both.total())}


class F1(_Metric):
    """F1 = 2 TP / (2 TP + FP + FN) of the second of two labels; 0 where it is neither predicted nor right."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        positive = self.labels[1]
        pairs = [
            (guess.strip() == positive, texts[0].strip() == positive) for guess, texts in zip(predictions, references)
        ]
        return {self.name: 2 * sum(map(all, pairs)) / max(1, sum(map(sum, pairs)))}


class Matthews(_Metric):
    """Matthews correlation coefficient, of several labels too; 0 where all predictions or all references are alike.

    Gorodkin, Computational Biology and Chemistry 28, 2004, equation 8.
    """

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        guesses, truths = [text.strip() for text in predictions], [texts[0].strip() for texts in references]
        total, right = len(guesses), sum(guess == truth for guess, truth in zip(guesses, truths))
        guessed, true = Counter(guesses), Counter(truths)
        covariance = right * total - sum(count * true[label] for label, count in guessed.items())
        spread = [total**2 - sum(count**2 for count in counts.values()) for counts in (guessed, true)]
        return {self.name: covariance / math.sqrt(spread[0] * spread[1]) if all(spread) else 0.0}


class _OfNumbers(_Metric):
    """Compares predicted with right numbers. Subclasses define ``_measure``."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {self.name: self._measure([float(text) for text in predictions], [float(row[0]) for row in references])}

    def _measure(self, predictions: list[float], references: list[float]) -> float:
        raise NotImplementedError


class Mse(_OfNumbers):
    """Mean squared error."""

    def _measure(self, predictions: list[float], references: list[float]) -> float:
        return sum((guess - truth) ** 2 for guess, truth in zip(predictions, references)) / len(predictions)


class Pearson(_OfNumbers):
    """Pearson correlation; 0 where all predictions or all references are alike."""

    def _measure(self, predictions: list[float], references: list[float]) -> float:
        import numpy as np

        if len(set(predictions)) == 1 or len(set(references)) == 1:
            return 0.0
        return float(np.corrcoef(predictions, references)[0, 1])


class Spearman(Pearson):
    """Pearson correlation of the ranks; equal numbers share their mean rank."""

    def _measure(self, predictions: list[float], references: list[float]) -> float:
        from scipy.stats import rankdata

        return super()._measure(list(rankdata(predictions)), list(rankdata(references)))


class TagAccuracy(_Metric):
    """Share of words whose tag is right."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        pairs = [pair for guess, texts in zip(predictions, references) for pair in zip(guess.split(), texts[0].split())]
        return {self.name: sum(guess == truth for guess, truth in pairs) / len(pairs)}


class _OfEntities(_Metric):
    """Compares entities, each with its first and last word and its type. Subclasses define ``_measure``."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        right = guessed = true = 0
        for guess, texts in zip(predictions, references):
            found, expected = set(entities(guess.split())), set(entities(texts[0].split()))
            right, guessed, true = right + len(found & expected), guessed + len(found), true + len(expected)
        return {self.name: self._measure(right, guessed, true)}

    def _measure(self, right: int, guessed: int, true: int) -> float:
        raise NotImplementedError


class EntityF1(_OfEntities):
    """F1 of all entities; 0 where none is right."""

    def _measure(self, right: int, guessed: int, true: int) -> float:
        return 2 * right / max(1, guessed + true)


class EntityPrecision(_OfEntities):
    """Share of predicted entities that are right; 0 where none is predicted."""

    def _measure(self, right: int, guessed: int, true: int) -> float:
        return right / max(1, guessed)


class EntityRecall(_OfEntities):
    """Share of right entities that are predicted; 0 where there is none."""

    def _measure(self, right: int, guessed: int, true: int) -> float:
        return right / max(1, true)


class Bleu(_Metric):
    """Corpus BLEU of sacrebleu with its defaults (13a tokens, exponential smoothing), 0 to 100."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        import sacrebleu

        most = max(map(len, references))
        streams: Any = [[texts[at] if at < len(texts) else None for texts in references] for at in range(most)]
        return {self.name: sacrebleu.corpus_bleu(predictions, streams).score}


class RougeL(_Metric):
    """Mean F-measure of ROUGE-L (rouge_score, no stemming), with the best reference of each prediction."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        scored = [scorer.score_multi(texts, guess) for guess, texts in zip(predictions, references)]
        return {self.name: sum(score["rougeL"].fmeasure for score in scored) / len(scored)}


class Meteor(_Metric):
    """METEOR, best reference, mean over predictions.

    Banerjee and Lavie, ACL workshop 2005, with NLTK's parameters, exact, stemmed and WordNet's matches.
    """

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        from nltk.tokenize import wordpunct_tokenize
        from nltk.translate.meteor_score import meteor_score

        words, synonyms = wordpunct_tokenize, _wordnet()
        scores = [
            meteor_score([words(text) for text in texts], words(guess), wordnet=synonyms)
            for guess, texts in zip(predictions, references)
        ]
        return {self.name: sum(scores) / len(scores)}


def _wordnet() -> Any:
    from nltk.corpus import wordnet

    return wordnet


#: The implementation of each metric in :data:`lowrank_cli.schema.METRICS`, except the mean over a mix.
METRICS = {
    "accuracy": Accuracy,
    "exact_match": ExactMatch,
    "number_match": NumberMatch,
    "squad_em": SquadEm,
    "squad_f1": SquadF1,
    "bleu": Bleu,
    "rouge_l": RougeL,
    "meteor": Meteor,
    "f1": F1,
    "macro_f1": MacroF1,
    "micro_f1": MicroF1,
    "matthews": Matthews,
    "pearson": Pearson,
    "spearman": Spearman,
    "mse": Mse,
    "entity_f1": EntityF1,
    "entity_precision": EntityPrecision,
    "entity_recall": EntityRecall,
    "tag_accuracy": TagAccuracy,
}


def compute(
    name: str,
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    extract: str | None = None,
    labels: Sequence[str] = (),
) -> dict[str, float]:
    """``{name: value}`` of predictions, each with one or several references.

    Args:
        extract: a regular expression whose last match in a text (or the first group of that match) replaces the text.
            A prediction without a match becomes empty, that is wrong; a reference without a match stays as it is.
        labels: the task's label words; ``f1`` is of the second.

    Raises:
        UserError: unknown metric.
    """
    require_choice("metric", name, METRICS)
    assert len(predictions) == len(references) > 0
    guesses, lists = _compared(predictions, references, extract)
    with tempfile.TemporaryDirectory() as folder:  # evaluate makes a folder even when it keeps data in memory
        metric = METRICS[name](keep_in_memory=True, cache_dir=folder, experiment_id="lrk")
        metric.labels = tuple(labels)
        return {name: float(metric.compute(predictions=guesses, references=lists)[name])}


def correct(
    name: str, predictions: Sequence[str], references: Sequence[str | Sequence[str]], extract: str | None = None
) -> list[bool] | None:
    """Which predictions are correct, if the metric is a share of correct ones; arguments as in :func:`compute`."""
    metric = METRICS[name]
    return metric.correct(*_compared(predictions, references, extract)) if issubclass(metric, _Share) else None


def _compared(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], extract: str | None
) -> tuple[list[str], list[list[str]]]:
    """What ``extract`` leaves of predictions and references; each prediction has a list of references."""
    lists = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    if not extract:
        return list(predictions), lists
    guesses = [_extracted(extract, text) or "" for text in predictions]
    return guesses, [[_extracted(extract, text) or text for text in texts] for texts in lists]


def _extracted(pattern: str, text: str) -> str | None:
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    return last.group(1 if last.re.groups else 0)
