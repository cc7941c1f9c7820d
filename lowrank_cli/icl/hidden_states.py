"""Last hidden states, which the language model's head reads: the features for calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cli.calibration.head import head_weight
from lowrank_cli.errors import UserError
from lowrank_cli.inference.choice_scores import Tick
from lowrank_cli.session.session import Session
from lowrank_cli.tasks import encode

#: Largest error of recomputed linear logits, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@torch.no_grad()
def last_hidden(session: Session, texts: Sequence[str], tick: Tick = lambda count: None) -> Tensor:
    """The hidden state of each text's last token after the final norm: (n, D), fp32, on the CPU.

    Every process must call this.

    Raises:
        UserError: the logits are not a linear function of it.
    """
    accelerator, size = session.accelerator, session.batch_size
    model = session.model.eval()
    mine = range(accelerator.process_index, len(texts), accelerator.num_processes)
    limits = [session.max_length()] * len(mine)
    rows = dict(zip(mine, encode.encode_prompts(session.tokenizer, [texts[i] for i in mine], limits), strict=True))
    order = sorted(mine, key=lambda index: len(rows[index]))
    head_inputs: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, args: head_inputs.append(args[0][:, -1])
    )
    states: list[tuple[int, Tensor]] = []
    try:
        with session.autocast():
            for start in range(0, len(order), size):
                indices = order[start : start + size]
                batch = encode.collate_prompts([rows[index] for index in indices], session.tokenizer.pad_token_id)
                inputs = {key: value.to(session.device) for key, value in batch.items()}
                positions = (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp_min(0)
                out = model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1)
                hidden = head_inputs.pop().float()  # (B, T or 1, D) -> (B, D)
                if start == 0:
                    _check_linear(model, hidden, out.logits[:, -1].float())
                states += zip(indices, hidden.cpu().unbind(), strict=True)
                tick(len(indices) * accelerator.num_processes)
    finally:
        hook.remove()
    return torch.stack([row for _, row in sorted(accelerator.gather_object(states), key=lambda item: item[0])])


def _check_linear(model: PreTrainedModel, hidden: Tensor, logits: Tensor) -> None:
    """Raise UserError unless the logits are W h + b, which the closed form needs."""
    head = model.get_output_embeddings()
    bias = getattr(getattr(head, "base", head), "bias", None)
    expected = hidden @ head_weight(model).t() + (0 if bias is None else bias.float())  # (B, D) @ (D, V) -> (B, V)
    error = (expected - logits).abs().max() / logits.abs().max().clamp_min(1e-6)
    if error > TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16]):
        raise UserError(
            f"model: the logits of this '{model.config.model_type}' are not linear in its last hidden state "
            f"(they differ by {error:.1%}), so the closed form does not hold"
        )
