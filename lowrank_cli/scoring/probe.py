"""What scores are measured on: a fixed batch, in groups of like length, and the loss of each of its rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lowrank_cli.adapter.lm_head import IGNORED, Answers, answers_at
from lowrank_cli.adapter.target_sites import structure_of
from lowrank_cli.scoring.answer_positions import answers_only

Batch = dict[str, Tensor]
PADDING = 0.2  #: largest share of padding in a group


@dataclass
class Probe:
    """A fixed batch of dev examples and how to run it.

    ``batch`` is right-padded, with ``labels`` (B, T) of a causal model or (B,) of an encoder; where several processes
    work, each holds its share, and ``add_up`` sums over them.
    """

    batch: Batch
    tokens: int  #: of one forward pass, at most (one row is always possible): what bounds memory
    autocast: Callable[[], AbstractContextManager] = nullcontext
    add_up: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)
    tick: Callable[[int], None] = field(default=lambda rows: None)  #: called with the rows that are done

    @property
    def rows(self) -> int:
        return len(self.batch["input_ids"])

    def weight(self) -> float:
        """What the summed loss is divided by: response tokens, or examples, of all processes."""
        labels = self.batch["labels"]
        own = labels.numel() if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())
        return self.add_up(torch.tensor(float(own), dtype=torch.float64, device=labels.device)).item()

    def groups(self) -> list[Batch]:
        """The batch in parts of like length, each without needless padding and within ``tokens``."""
        lengths = self.batch["attention_mask"].sum(dim=1).tolist()
        order = sorted(range(self.rows), key=lambda row: -lengths[row])
        groups: list[list[int]] = []
        for row in order:
            longest = lengths[groups[-1][0]] if groups else 0
            if not groups or lengths[row] < (1 - PADDING) * longest or (len(groups[-1]) + 1) * longest > self.tokens:
                groups.append([])
            groups[-1].append(row)
        return [self._take(rows, lengths[rows[0]]) for rows in groups]

    def pieces(self, count: int) -> list[Batch]:
        """The batch in at most ``count`` parts of like size, in its own order; as many in every process."""
        lengths = self.batch["attention_mask"].sum(dim=1).tolist()
        rows, processes = self.add_up(torch.tensor([self.rows, 1], device=self.batch["labels"].device)).tolist()
        rows = torch.arange(self.rows).tensor_split(min(count, rows // processes))  # shares differ by one row at most
        return [self._take(part.tolist(), max(lengths[row] for row in part)) for part in rows]

    def _take(self, rows: list[int], longest: int) -> Batch:
        index = torch.tensor(rows, device=self.batch["labels"].device)
        taken = {key: value[index] for key, value in self.batch.items()}
        return {key: value[:, :longest] if value.dim() == 2 else value for key, value in taken.items()}


def repeated(batch: Batch, times: int) -> Batch:
    """``times`` copies of the rows, one copy of all behind another."""
    return {key: tile(value, times) for key, value in batch.items()}


def tile(tensor: Tensor, times: int) -> Tensor:
    """(B, …) -> (times * B, …)."""
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))


def answered_rows(batch: Batch) -> Tensor | None:
    """The row of each position (N,) that :func:`row_losses` computes to the end; None for one answer a row."""
    labels = batch["labels"]
    return None if labels.dim() == 1 else (labels[:, 1:] != IGNORED).nonzero()[:, 0]


def row_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy of each row (B,), fp32, summed over its response tokens."""
    labels = batch["labels"] if batch["labels"].dim() == 1 else batch["labels"][:, 1:]  # (B,) or (B, T - 1)
    return _by_row(answers_of(model, batch).losses(labels[labels != IGNORED]), batch)


def row_divergences(model: PreTrainedModel, batch: Batch, reference: Answers) -> Tensor:
    """KL(p ‖ q) of each row (B,), fp32, summed over its response tokens; q is the model's and p that of ``reference``,
    of which ``batch`` may hold several copies, one behind the other."""
    found, divergences = answers_of(model, batch), []
    for span, logits in found.chunks():
        same = torch.arange(span.start, span.start + len(logits), device=logits.device) % len(reference.states)
        p, q = reference.logits(same).log_softmax(dim=-1), logits.log_softmax(dim=-1)  # (n, V)
        divergences.append(F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1))  # (n,)
    return _by_row(torch.cat(divergences), batch)


def answers_of(model: PreTrainedModel, batch: Batch) -> Answers:
    """One pass over ``batch``, computed to the end at response tokens; of an encoder one answer a row."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if batch["labels"].dim() == 1:
        structure, first = structure_of(model), torch.zeros_like(batch["input_ids"], dtype=torch.bool)  # (B, T)
        first[:, 0] = True
        with answers_only(model, first) if structure and structure.first_answers else nullcontext():
            logits = model(**inputs).logits  # (B, labels)
        return Answers(logits, torch.arange(len(logits), device=logits.device), None)
    inputs = {key: value[:, :-1] for key, value in inputs.items()}  # nothing follows the last token
    answered = batch["labels"][:, 1:] != IGNORED  # (B, T - 1)
    with answers_only(model, answered):
        return answers_at(model, inputs, answered)


def _by_row(values: Tensor, batch: Batch) -> Tensor:
    """Sums over the response tokens of each row: (N,) -> (B,)."""
    rows = answered_rows(batch)
    return values if rows is None else values.new_zeros(len(batch["labels"])).index_add(0, rows, values)
