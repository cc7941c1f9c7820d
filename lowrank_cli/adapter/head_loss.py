"""Losses and divergences of an encoder's answers; the type and shape of the labels say what is learnt.

| labels | answer | loss |
|---|---|---|
| integers (B,) | one label | cross-entropy |
| integers (B, T) | a tag for each word, on its first token | cross-entropy |
| floats (B,) | a number | squared error |
| floats (B, C) | any of C labels | binary cross-entropy, mean over labels |
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lowrank_cli.adapter.lm_head import IGNORED


def head_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each answer (N,), fp32: one a row, or one for each tag that is not :data:`IGNORED`.

    Args:
        logits: (B, C), or (B, T, C) of tags.
    """
    logits = logits.float()
    if not labels.is_floating_point():
        wanted = labels != IGNORED
        return F.cross_entropy(logits[wanted], labels[wanted], reduction="none")  # (N, C), (N,) -> (N,)
    if labels.dim() == 1:
        return (logits.squeeze(1) - labels).square()  # (B, 1) -> (B,)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)  # (B, C) -> (B,)


def head_divergences(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """KL(p ‖ q) of each answer (N,), fp32; p is ``reference`` (N, C) and q is ``logits`` (N, C).

    The distributions are those whose negative log-likelihood is the loss: softmax of labels and tags; Bernoulli of any
    labels, mean over them; of a number, a normal distribution with variance 1/2.
    """
    q, p = logits.float(), reference.float()
    if not labels.is_floating_point():
        return F.kl_div(q.log_softmax(dim=-1), p.log_softmax(dim=-1), log_target=True, reduction="none").sum(dim=-1)
    if labels.dim() == 1:
        return (p - q).squeeze(1).square()  # (N, 1) -> (N,)
    yes, no = (
        p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)),
        (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q)),
    )
    return (yes + no).mean(dim=1)  # (N, C) -> (N,)
