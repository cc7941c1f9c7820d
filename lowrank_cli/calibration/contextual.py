"""Contextual calibration: answer scores relative to those of content-free inputs.

Zhao et al., "Calibrate Before Use", ICML 2021 (ConCa: three content-free inputs), and Fei et al., "Mitigating Label
Biases for In-context Learning", ACL 2023 (D-ConCa: random words of the domain, several texts). Both divide by the mean
probability of each answer over these inputs.

Reconstruction, for tasks whose inputs are pairs: a content-free input fills each column of the template, and random
words are drawn for each column separately, from its own words and in its average number. As in Zhao et al.'s code, the
mean for ConCa is that of probabilities over the vocabulary; for D-ConCa each text's probabilities sum to 1 over the
answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from torch import Tensor

CONTENT_FREE = ("N/A", "[MASK]", "")  #: Zhao et al., section 5


def bias(scores: Tensor) -> Tensor:
    """log of the mean probability of each answer over content-free inputs: log scores (…, M, C) -> (…, C)."""
    return scores.logsumexp(dim=-2) - math.log(scores.shape[-2])


def random_texts(texts: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """``count`` texts of words drawn from ``texts``, with their average length (at least one word).

    Call it for each column, since a premise has other and more words than a hypothesis.
    """
    words = [word for text in texts for word in text.split()]
    length = max(1, round(len(words) / len(texts)))
    return [" ".join(rng.choices(words, k=length)) for _ in range(count)]
