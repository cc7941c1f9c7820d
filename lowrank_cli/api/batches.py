"""Batches of a user's training loop: prompts, labels, and examples without padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lowrank_cli.adapter.lm_head import IGNORED
from lowrank_cli.errors import UserError

#: Keyword arguments of a model: ``input_ids`` (B, T), ``attention_mask`` (B, T), ``labels`` (B, T) or (B,), …
Batch = Mapping[str, Tensor]


def prompt_mask(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mask of the prompts (B, T): unpadded tokens before the first label of a row that is not -100.

    Raises UserError if a row has no prompt.
    """
    mask = (labels != IGNORED).cumsum(dim=1) == 0  # (B, T)
    mask = mask if attention_mask is None else mask & attention_mask.bool()
    if not mask.any(dim=1).all():
        raise UserError(
            "labels: a row has no prompt to route by (labels are -100 on the prompt and the tokens of the answer "
            "behind it); set them so, or give the model prompt_mask"
        )
    return mask


def on_device(batch: Batch, model: PreTrainedModel) -> dict[str, Tensor]:
    """The batch on the device of ``model``."""
    return {key: value.to(model.device) for key, value in batch.items()}


def require_labels(batch: Batch, key: str) -> None:
    """Raise UserError, naming ``key``, unless the batch has inputs and labels."""
    if "labels" not in batch or "input_ids" not in batch:
        raise UserError(f"{key}: a batch has {', '.join(batch)}; it needs input_ids and labels")


def examples(batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """The examples of right-padded ``batches``, without padding: tensors (T,), and a label () of classifiers."""
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        if not mask[:, 0].all():
            raise UserError("dev: a batch is padded on the left; pad on the right")
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            yield {key: value[row, :length] if value.dim() == 2 else value[row] for key, value in batch.items()} | {
                "attention_mask": mask[row, :length]
            }


def padded(rows: Sequence[Tensor], key: str) -> Tensor:
    """Stack tensors (T,) into (B, T), padded on the right, or scalars into (B,); ``key`` sets the padding value."""
    if rows[0].dim() == 0:
        return torch.stack(list(rows))  # (B,)
    longest, fill = max(map(len, rows)), IGNORED if key == "labels" else 0
    return torch.stack([F.pad(row, (0, longest - len(row)), value=fill) for row in rows])  # (B, T)
