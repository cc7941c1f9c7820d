"""What a metric's name says of it: quality or cost, which direction is better, which metric of a run comes first."""

from __future__ import annotations

from collections.abc import Iterable

from lowrank_cli.schema import METRICS

_COSTS = ("seconds", "tokens_per_second", "parameters", "bytes", "steps", "epochs", "_step", "examples", "padding")
_LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "seconds", "parameters", "bytes", "padding")
STANDARD_ERROR = "_stderr"  #: ends the name of a metric's standard error


def is_cost(name: str) -> bool:
    """Whether the metric counts time, memory, parameters, steps, examples or padding, which say nothing of quality."""
    return name.endswith(_COSTS)


def is_loss(name: str) -> bool:
    return name.endswith("loss")


def is_share(name: str) -> bool:
    """Whether the metric is between 0 and 1, so that people write it in percent."""
    metric = METRICS.get(name.rpartition("/")[2])
    return metric is not None and (metric.low, metric.high) == (0.0, 1.0)


def lower_is_better(name: str) -> bool:
    metric = METRICS.get(name.rpartition("/")[2])
    return not metric.higher_is_better if metric else name.endswith(_LOWER_IS_BETTER)


def quality(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that say how good a model is, without repeats: test before dev, losses last in each."""
    named = [name for name in dict.fromkeys(names) if _is_quality(name)]
    return sorted(named, key=lambda name: (name.startswith("dev/"), is_loss(name)))


def _is_quality(name: str) -> bool:
    return name.startswith(("test/", "dev/")) and not is_cost(name) and not name.endswith(STANDARD_ERROR)


def main_metric(names: Iterable[str], wanted: Iterable[str]) -> str:
    """The metric to compare runs by; empty if none of ``names`` measures quality.

    Args:
        wanted: metrics of the runs' tasks, such as ``accuracy``. They come before others of the same split.
    """
    wanted = set(wanted)
    return min(quality(names), key=lambda name: (name.startswith("dev/"), name.split("/")[1] not in wanted), default="")


def in_words(name: str) -> str:
    """``test/exact_match`` → ``test exact match``."""
    return name.replace("/", " ").replace("_", " ")
