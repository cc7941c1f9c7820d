"""Contextual calibration: answer scores relative to those of content-free inputs.

Zhao et al., "Calibrate Before Use", ICML 2021 (one content-free input), and Fei et al., "Mitigating Label Biases for
In-context Learning", ACL 2023 (random words of the domain, several texts). Both divide by the mean probability of
each answer over the content-free inputs, where an input's probabilities sum to 1 over the answers.

Reconstruction, for tasks whose inputs are pairs: "N/A" fills each column of the template, and random words are drawn
for each column separately, from its own words and in its average number.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

CONTENT_FREE = "N/A"  #: Zhao et al., section 5


def bias(scores: Tensor) -> Tensor:
    """log of the mean probability of each answer over content-free inputs: log scores (…, M, C) -> (…, C)."""
    return scores.softmax(dim=-1).mean(dim=-2).log()


def random_texts(texts: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """``count`` texts of words drawn from ``texts``, with their average length (at least one word).

    Call it for each column, since a premise has other and more words than a hypothesis.
    """
    words = [word for text in texts for word in text.split()]
    length = max(1, round(len(words) / len(texts)))
    return [" ".join(rng.choices(words, k=length)) for _ in range(count)]
