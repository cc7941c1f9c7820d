"""Metrics as subclasses of :class:`evaluate.Metric`: no Hub, no network, only temporary files.

Importing this module imports ``evaluate``, which takes seconds: import it where a metric is computed.
Shares are 0 to 1; BLEU is 0 to 100, as sacrebleu reports it.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import datasets
import evaluate

from lowrank_cli.errors import require_choice

NUMBER = re.compile(r"(?:(?<!\d)[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")  # in 10-4 the second number is 4


class _Metric(evaluate.Metric):
    """Compares each predicted string with one or more reference strings. Subclasses define ``_compute``."""

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


class MacroF1(_Metric):
    """Mean over the labels that are predicted or right of F1 = 2 TP / (2 TP + FP + FN), ignoring white space around."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        guesses, truths = ([text.strip() for text in texts] for texts in (predictions, (row[0] for row in references)))
        hits = Counter(guess for guess, truth in zip(guesses, truths) if guess == truth)
        both = Counter(guesses) + Counter(truths)  # 2 TP + FP + FN
        return {self.name: sum(2 * hits[label] / count for label, count in both.items()) / len(both)}


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


METRICS = {
    "accuracy": Accuracy,
    "exact_match": ExactMatch,
    "number_match": NumberMatch,
    "bleu": Bleu,
    "rouge_l": RougeL,
    "macro_f1": MacroF1,
}


def compute(
    name: str,
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    extract: str | None = None,
) -> dict[str, float]:
    """``{name: value}`` of predictions, each with one or several references.

    Args:
        extract: a regular expression whose last match in a text (or the first group of that match) replaces the text.
            A prediction without a match becomes empty, that is wrong; a reference without a match stays as it is.

    Raises:
        UserError: unknown metric.
    """
    require_choice("metric", name, METRICS)
    assert len(predictions) == len(references) > 0
    guesses, lists = _compared(predictions, references, extract)
    with tempfile.TemporaryDirectory() as folder:  # evaluate makes a folder even when it keeps data in memory
        metric = METRICS[name](keep_in_memory=True, cache_dir=folder, experiment_id="lrk")
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
