"""Contextual calibration: answer scores relative to what inputs without content give.

Zhao et al., "Calibrate Before Use", ICML 2021 (one content-free input), and Fei et al., "Mitigating Label Biases for
In-context Learning", ACL 2023 (random words of the domain, several texts). Both divide by the mean probability of
each answer over the content-free inputs, where an input's probabilities sum to 1 over the answers.

Reconstruction, for tasks whose inputs are pairs: "N/A" stands in each column of the template, and random words are
drawn for each column by itself, out of that column's own words and as many as it has on average.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

CONTENT_FREE = "N/A"  #: of Zhao et al., section 5


def bias(scores: Tensor) -> Tensor:
    """log of the mean probability of each answer over content-free inputs: log scores (M, C) -> (C,)."""
    return scores.softmax(dim=-1).mean(dim=0).log()


def random_texts(texts: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """``count`` texts of words drawn from all ``texts``, each as long as those are on average (at least one word).

    ``texts`` are those of one column, since a premise has other words, and more of them, than a hypothesis.
    """
    words = [word for text in texts for word in text.split()]
    length = max(1, round(len(words) / len(texts)))
    return [" ".join(rng.choices(words, k=length)) for _ in range(count)]
