"""The metrics of tasks: what each measures, for which answers, its range and its direction.

:mod:`lowrank_cli.tasks.metrics` computes them; nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowrank_cli.errors import UserError

ANSWERS = ("labels", "choices", "free", "chat", "number", "multi_label", "tags", "mix")  #: values of ``task.answer``
TEXT = ("labels", "choices", "free", "chat")
GENERATED = ("free", "chat")
OF_ENCODERS = ("number", "multi_label", "tags")  #: answers that only an encoder's head gives


@dataclass(frozen=True)
class Metric:
    """One metric."""

    about: str  #: what it measures, in a line
    answers: tuple[str, ...]  #: values of ``task.answer`` that it fits
    low: float = 0.0  #: smallest value
    high: float | None = 1.0  #: largest value; None: unbounded
    higher_is_better: bool = True
    share: bool = False  #: whether it is the share of correct answers


METRICS = {
    "accuracy": Metric(
        "share of answers that are right; of multi_label, with exactly the right labels",
        (*TEXT, "multi_label"),
        share=True,
    ),
    "exact_match": Metric("share of answers that are right but for case and white space", TEXT, share=True),
    "number_match": Metric("share of answers whose last number is right", TEXT, share=True),
    "squad_em": Metric(
        "share of answers that are right but for case, punctuation, articles and white space (SQuAD)",
        GENERATED,
        share=True,
    ),
    "squad_f1": Metric("F1 of the words that answer and reference share, best reference, mean (SQuAD)", GENERATED),
    "bleu": Metric("corpus BLEU (sacrebleu)", TEXT, high=100.0),
    "rouge_l": Metric("ROUGE-L, best reference, mean (rouge_score)", TEXT),
    "meteor": Metric("METEOR, best reference, mean (NLTK with WordNet)", TEXT),
    "f1": Metric("F1 of the second of two labels", ("labels",)),
    "macro_f1": Metric("F1 of each label, mean over labels", ("labels", "multi_label")),
    "micro_f1": Metric("F1 over all decisions on all labels", ("multi_label",)),
    "matthews": Metric("Matthews correlation of predicted and right labels", ("labels",), low=-1.0),
    "pearson": Metric("Pearson correlation of predicted and right numbers", ("number",), low=-1.0),
    "spearman": Metric("Spearman rank correlation of predicted and right numbers", ("number",), low=-1.0),
    "mse": Metric("mean squared error", ("number",), high=None, higher_is_better=False),
    "entity_f1": Metric("F1 of entities with the right span and type (conlleval, seqeval)", ("tags",)),
    "entity_precision": Metric("share of predicted entities that are right", ("tags",)),
    "entity_recall": Metric("share of right entities that are predicted", ("tags",)),
    "tag_accuracy": Metric("share of words whose tag is right", ("tags",)),
    "mean": Metric("mean of the metrics of a mix's tasks", ("mix",), low=-1.0, high=None),
}


def metrics_of(answer: str) -> list[str]:
    """The metrics for a kind of answer."""
    return [name for name, metric in METRICS.items() if answer in metric.answers]


def require_data(key: str, metrics: Iterable[str]) -> None:
    """Raise UserError if one of ``metrics``, which ``key`` names, needs data that are not on this machine."""
    if "meteor" not in metrics:
        return
    import nltk

    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(name)
            return
        except LookupError:
            continue
    raise UserError(f"{key}: meteor needs WordNet, which this downloads: python -m nltk.downloader wordnet")
