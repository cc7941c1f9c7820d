"""The fixed batch that scores are measured on, in groups of similar length, and the loss of each row."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cli.adapter.head_loss import head_divergences, head_losses
from lowrank_cli.adapter.image_input import PIXELS
from lowrank_cli.adapter.lm_head import IGNORED, Answers, answers_at
from lowrank_cli.adapter.target_sites import structure_of
from lowrank_cli.scoring.answer_positions import answers_only

Batch = dict[str, Tensor]
PADDING = 0.2  #: largest share of padding in a group


@dataclass
class Probe:
    """A fixed batch of dev examples, and how to run it. Each process holds its share."""

    #: right-padded, with ``labels`` (B, T) of a causal model or as :mod:`~lowrank_cli.adapter.head_loss` has them
    batch: Batch
    tokens: int  #: most tokens (or patches) of one forward pass (at least one row), to bound memory
    autocast: Callable[[], AbstractContextManager] = nullcontext
    add_up: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)  #: sums over processes
    #: number of this process, and of all: its rows are those numbered process, process + processes, … of the batch
    share: tuple[int, int] = (0, 1)
    tick: Callable[[int], None] = field(default=lambda rows: None)  #: called with the number of rows done

    @property
    def rows(self) -> int:
        return len(self.batch["labels"])

    def weight(self) -> float:
        """The divisor of the summed loss: response tokens, or examples, of all processes."""
        labels = self.batch["labels"]
        count = len(labels) if one_a_row(labels) else int((labels[:, 1:] != IGNORED).sum())  # no word is at token 0
        return self.add_up(torch.tensor(float(count), dtype=torch.float64, device=labels.device)).item()

    def groups(self) -> list[Batch]:
        """The batch in groups of similar length with little padding, each within ``tokens``."""
        lengths = row_lengths(self.batch)
        order = sorted(range(self.rows), key=lambda row: -lengths[row])
        groups: list[list[int]] = []
        for row in order:
            longest = lengths[groups[-1][0]] if groups else 0
            if not groups or lengths[row] < (1 - PADDING) * longest or (len(groups[-1]) + 1) * longest > self.tokens:
                groups.append([])
            groups[-1].append(row)
        return [self._take(rows, lengths[rows[0]]) for rows in groups]

    def pieces(self, count: int) -> list[list[Batch]]:
        """The batch of all processes in order, in up to ``count`` pieces of similar size.

        Each is a batch with this process's rows of it, or none.
        """
        lengths = row_lengths(self.batch)
        rows = int(self.add_up(torch.tensor(self.rows, device=self.batch["labels"].device)).item())
        process, processes = self.share
        numbers, pieces = torch.arange(process, rows, processes), []
        for piece in torch.arange(rows).tensor_split(min(count, rows)):
            mine = torch.isin(numbers, piece).nonzero().flatten().tolist()
            pieces.append([self._take(mine, max(lengths[row] for row in mine))] if mine else [])
        return pieces

    def _take(self, rows: list[int], longest: int) -> Batch:
        index = torch.tensor(rows, device=self.batch["labels"].device)
        taken = {key: value[index] for key, value in self.batch.items()}
        return {
            key: value[:, :longest] if value.dim() == 2 and not value.is_floating_point() else value
            for key, value in taken.items()
        }


def row_lengths(batch: Batch) -> list[int]:
    """Tokens of each row without padding, or patches of each image."""
    if "pixel_values" in batch:
        images, _, height, width = batch["pixel_values"].shape
        return [max(1, height * width // PIXELS)] * images
    lengths: list[int] = batch["attention_mask"].sum(dim=1).tolist()
    return lengths


def one_a_row(labels: Tensor) -> bool:
    """Whether each row has one answer: a label, a number or a set of labels, and not tags or a text."""
    return labels.dim() == 1 or labels.is_floating_point()


def repeated(batch: Batch, times: int) -> Batch:
    """The batch repeated ``times`` times along its rows."""
    return {key: tile(value, times) for key, value in batch.items()}


def tile(tensor: Tensor, times: int) -> Tensor:
    """(B, …) -> (times * B, …)."""
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))


def answered_rows(batch: Batch) -> Tensor | None:
    """The batch row of each answer position (N,); None with one answer for each row."""
    labels = batch["labels"]
    return None if one_a_row(labels) else (labels[:, 1:] != IGNORED).nonzero()[:, 0]


def row_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The loss of each row (B,), fp32, summed over its response tokens or tags."""
    labels, answers = batch["labels"], answers_of(model, batch)
    if one_a_row(labels):
        return head_losses(answers.states, labels)
    return _by_row(answers.losses(labels[:, 1:][labels[:, 1:] != IGNORED]), batch)


def row_divergences(model: PreTrainedModel, batch: Batch, reference: Answers) -> Tensor:
    """KL(p ‖ q) of each row (B,), fp32, summed over its answers; p is ``reference``, q the model's.

    ``batch`` may hold several copies of the rows of ``reference``, one after the other.
    """
    answers, divergences = answers_of(model, batch), []
    for span, logits in answers.chunks():
        same = torch.arange(span.start, span.start + len(logits), device=logits.device) % len(reference.states)
        divergences.append(head_divergences(logits, reference.logits(same), batch["labels"]))  # (n, V) -> (n,)
    return _by_row(torch.cat(divergences), batch)


def answers_of(model: PreTrainedModel, batch: Batch) -> Answers:
    """One pass over ``batch``, completed only at response tokens or tags; other answers are one for each row."""
    inputs, labels = {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if one_a_row(labels):
        structure = structure_of(model)
        with _first_only(model, batch) if structure and structure.first_answers else nullcontext():
            logits = model(**inputs).logits  # (B, labels)
        return Answers(logits, torch.arange(len(logits), device=logits.device), None)
    if not model.can_generate():  # tags
        tagged = labels != IGNORED  # (B, T)
        with answers_only(model, tagged):
            return Answers(model(**inputs).logits[tagged], tagged.nonzero()[:, 0], None)
    inputs = {key: value[:, :-1] for key, value in inputs.items()}  # the last token predicts nothing
    answered = labels[:, 1:] != IGNORED  # (B, T - 1)
    with answers_only(model, answered):
        return answers_at(model, inputs, answered)


def _first_only(model: PreTrainedModel, batch: Batch) -> AbstractContextManager:
    """:func:`answers_only` at the first position."""
    first = torch.zeros_like(batch["input_ids"], dtype=torch.bool)  # (B, T)
    first[:, 0] = True
    return answers_only(model, first)


def _by_row(values: Tensor, batch: Batch) -> Tensor:
    """Sums over the response tokens of each row: (N,) -> (B,)."""
    rows = answered_rows(batch)
    return values if rows is None else values.new_zeros(len(batch["labels"])).index_add(0, rows, values)
