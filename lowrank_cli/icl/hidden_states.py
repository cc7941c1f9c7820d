"""What the language model's head reads: the features that calibration works on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cli.calibration.head import head_weight
from lowrank_cli.errors import UserError
from lowrank_cli.inference.choice_scores import Tick
from lowrank_cli.inference.session import Session
from lowrank_cli.tasks import encode

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  #: of logits that are linear, relative to the largest


@torch.no_grad()
def last_hidden(session: Session, texts: Sequence[str], tick: Tick = lambda count: None) -> Tensor:
    """The hidden state behind the last token of each text, after the final norm: (n, D), fp32, on the CPU."""
    accelerator, size = session.accelerator, session.batch_size
    model = session.model.eval()
    mine = range(accelerator.process_index, len(texts), accelerator.num_processes)
    rooms = [session.room()] * len(mine)
    rows = dict(zip(mine, encode.encode_prompts(session.tokenizer, [texts[i] for i in mine], rooms), strict=True))
    order = sorted(mine, key=lambda index: len(rows[index]))
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: seen.append(args[0][:, -1]))
    found: list[tuple[int, Tensor]] = []
    try:
        with session.autocast():
            for start in range(0, len(order), size):
                part = order[start : start + size]
                batch = encode.collate_prompts([rows[index] for index in part], session.tokenizer.pad_token_id)
                inputs = {key: value.to(session.device) for key, value in batch.items()}
                positions = (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp_min(0)
                out = model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1)
                hidden = seen.pop().float()  # (B, T or 1, D) -> (B, D)
                if start == 0:
                    _check_linear(model, hidden, out.logits[:, -1].float())
                found += zip(part, hidden.cpu().unbind(), strict=True)
                tick(len(part) * accelerator.num_processes)
    finally:
        hook.remove()
    return torch.stack([row for _, row in sorted(gather_object(found), key=lambda item: item[0])])


def _check_linear(model: PreTrainedModel, hidden: Tensor, logits: Tensor) -> None:
    """The closed form needs logits that are W h + b."""
    head = model.get_output_embeddings()
    bias = getattr(getattr(head, "base", head), "bias", None)
    expected = hidden @ head_weight(model).t() + (0 if bias is None else bias.float())  # (B, D) @ (D, V) -> (B, V)
    error = (expected - logits).abs().max() / logits.abs().max().clamp_min(1e-6)
    if error > TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16]):
        raise UserError(
            f"model: the logits of this '{model.config.model_type}' are no linear function of its last hidden state "
            f"(they differ by {error:.1%}), so the closed form does not hold"
        )
