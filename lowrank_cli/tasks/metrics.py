"""Metrics as :class:`evaluate.Metric`, defined here: no Hub, no network, no files but temporary ones.

Importing this module imports ``evaluate``, which takes seconds: import it where a metric is computed.
Shares are 0 to 1; BLEU is 0 to 100, as sacrebleu reports it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import datasets
import evaluate

from lowrank_cli.errors import require_choice

NUMBER = re.compile(r"(?:(?<!\d)[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")  # in 10-4 the second number is 4


class _Metric(evaluate.Metric):
    """Predictions are strings; each has one or more reference strings. Subclasses define ``_compute``."""

    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.List(text)})
        return evaluate.MetricInfo(
            description=self.__doc__ or "", citation="", features=features, inputs_description=""
        )


class _Share(_Metric):
    """Share of predictions that equal one of their references, after ``normal`` was applied to both."""

    @staticmethod
    def normal(text: str):
        raise NotImplementedError

    def _compute(self, predictions, references):
        right = [
            self.normal(guess) is not None and self.normal(guess) in [self.normal(text) for text in texts]
            for guess, texts in zip(predictions, references)
        ]
        return {self.name: sum(right) / len(right)}


class Accuracy(_Share):
    """Share of predictions that equal a reference, leading and trailing space aside."""

    normal = staticmethod(str.strip)


class ExactMatch(_Share):
    """Share of predictions that equal a reference; letter case and the amount of white space do not count."""

    @staticmethod
    def normal(text: str) -> str:
        return " ".join(text.casefold().split())


class NumberMatch(_Share):
    """Share of predictions whose last number has a reference's value: ``1,000.0`` equals ``1000``."""

    @staticmethod
    def normal(text: str) -> Decimal | None:
        found = NUMBER.findall(text)
        try:
            return Decimal(found[-1].replace(",", "")) if found else None
        except InvalidOperation:
            return None


class Bleu(_Metric):
    """Corpus BLEU of sacrebleu with its defaults (13a tokens, exponential smoothing), 0 to 100."""

    def _compute(self, predictions, references):
        import sacrebleu

        most = max(map(len, references))
        streams = [[texts[at] if at < len(texts) else None for texts in references] for at in range(most)]
        return {self.name: sacrebleu.corpus_bleu(predictions, streams).score}


class RougeL(_Metric):
    """Mean F-measure of ROUGE-L (rouge_score, no stemming), the best reference of each prediction."""

    def _compute(self, predictions, references):
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
}


def compute(
    name: str,
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    extract: str | None = None,
) -> dict[str, float]:
    """``{name: value}`` of predictions against one or several references each.

    Args:
        extract: a regular expression; of each text only the last match counts (its group where it has one).
            A prediction without a match counts as empty, that is wrong; a reference without one counts whole.

    Raises:
        UserError: an unknown metric.
    """
    require_choice("metric", name, METRICS)
    assert len(predictions) == len(references) > 0
    many = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    guesses = list(predictions)
    if extract:
        guesses = [_extracted(extract, text) or "" for text in guesses]
        many = [[_extracted(extract, text) or text for text in texts] for texts in many]
    with tempfile.TemporaryDirectory() as folder:  # evaluate makes a folder even when it keeps data in memory
        metric = METRICS[name](keep_in_memory=True, cache_dir=folder, experiment_id="lrk")
        return {name: float(metric.compute(predictions=guesses, references=many)[name])}


def _extracted(pattern: str, text: str) -> str | None:
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    return last.group(1 if last.re.groups else 0)
