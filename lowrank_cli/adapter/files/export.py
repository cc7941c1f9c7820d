"""Export for other programs: merged weights, or a LoRA for the PEFT library and servers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_cli.adapter.adapted_model import Adapter, replace_module
from lowrank_cli.adapter.files.save_load import CONFIG, PREFIX, WEIGHTS, canary, prove
from lowrank_cli.adapter.image_input import inputs_of
from lowrank_cli.adapter.linear import unwrapped
from lowrank_cli.adapter.spans import index
from lowrank_cli.adapter.target_sites import head_names, peft_task_type
from lowrank_cli.errors import UserError

#: Singular values below this share of the largest are fp32 rounding.
ROUNDING = 1e-6


@torch.no_grad()
def truncate(b: Tensor, a: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """Factors b', a' of the best approximation of b a with ``rank``, and its error ‖b a − b' a'‖_F / ‖b a‖_F.

    None keeps all ranks above rounding. Costs a QR of b (O, R) and of a (R, I), and an SVD (R, R).
    """
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.t())
    u, s, v = torch.linalg.svd(left.R @ right.R.t())
    keep = int((s > ROUNDING * s[:1].clamp_min(1e-30)).sum())
    keep = keep if rank is None else min(keep, rank)
    root = s[:keep].sqrt()
    error = (s[keep:].norm() / s.norm().clamp_min(1e-30)).item()
    return left.Q @ u[:, :keep] * root, root.unsqueeze(1) * (v[:keep] @ right.Q.t()), error


@torch.no_grad()
def as_lora(adapter: Adapter, rank: int | None) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """The adapter as one LoRA, B (O, R) and A (R, I) with scale 1, for each linear whose weight changes.

    Args:
        rank: bound on the rank of each module (a packed linear has several); None keeps all.

    Returns:
        The factors by path, and the largest truncation error, relative to its module's change.

    Raises:
        UserError: no single weight equals an adapted one, or nothing has changed.
    """
    _require_mergeable(adapter)
    if not adapter.linears:
        raise UserError("export.format: lora holds low-rank updates, and this adapter has none (allowed: merged)")
    loras: dict[str, tuple[Tensor, Tensor]] = {}
    worst = 0.0
    for path, linear in adapter.linears.items():
        outputs = linear.rows(None).shape[0]
        columns, rows = [], []
        for module, span in linear.updates:
            b, a, error = truncate(*module.delta_factors(), rank)
            whole = b.new_zeros(outputs, b.shape[1])
            whole[index(span, outputs, whole.device)] = b
            columns.append(whole)
            rows.append(a)
            worst = max(worst, error)
        b, a = torch.cat(columns, dim=1), torch.cat(rows)
        if len(a):
            loras[path] = (b, a)
    if not loras:
        raise UserError("export: this adapter changes nothing")
    return loras, worst


@torch.no_grad()
def save_lora(adapter: Adapter, loras: dict[str, tuple[Tensor, Tensor]], folder: Path) -> None:
    """Write ``loras`` (see :func:`as_lora`) as a PEFT adapter, with our proof.

    ``r`` and ``lora_alpha`` are the largest rank; smaller ranks are listed by full name. No module has rank 0.
    """
    tensors = {}
    for path, (b, a) in loras.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.cpu().contiguous()
    heads = head_names(adapter.model)
    for name, parameter in adapter.trained.items():
        if name.startswith(tuple(f"{head}." for head in heads)):
            tensors[PREFIX + name] = parameter.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    ranks = {path: len(a) for path, (_, a) in loras.items()}
    most = max(ranks.values())
    smaller = {re.escape(path): rank for path, rank in ranks.items() if rank < most}
    config = {
        "peft_type": "LORA",
        "task_type": peft_task_type(adapter.model),
        "base_model_name_or_path": adapter.model.config.name_or_path or None,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": sorted(ranks),
        "modules_to_save": heads or None,
        "fan_in_fan_out": any(isinstance(linear.base, Conv1D) for linear in adapter.linears.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    prove(adapter, folder, *_lora_canary(adapter, loras))


def lora_error(adapter: Adapter, loras: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Relative error of the canary's logits with ``loras`` in place of the adapter."""
    return relative_error(_lora_canary(adapter, loras)[1], canary(adapter)[1])


def _lora_canary(adapter: Adapter, loras: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The canary (1, 16) and its logits (V,), with ``loras`` in place of the adapter."""
    with ExitStack() as undo, adapter.disabled():
        for path, (b, a) in loras.items():
            linear = unwrapped(adapter.model.get_submodule(path))
            undo.callback(linear.register_forward_hook(_update_hook(b, a)).remove)
        return canary(adapter)


def _update_hook(b: Tensor, a: Tensor) -> Callable[..., Tensor]:
    """A forward hook that adds b a x to a linear's output for x (…, I), with b (O, R) and a (R, I)."""
    return lambda linear, args, y: y + F.linear(F.linear(args[0], a.to(args[0].dtype)), b.to(y.dtype))  # (…, O)


def save_merged(adapter: Adapter, folder: Path) -> None:
    """Write the model with merged weights. The adapter is unusable afterwards."""
    merge_into_model(adapter)
    adapter.model.save_pretrained(folder)


def merge_into_model(adapter: Adapter) -> None:
    """Merge all updates and take the adapter out of the model, which has its original modules again."""
    _require_mergeable(adapter)
    adapter.merge()
    for path, linear in adapter.linears.items():
        replace_module(adapter.model, path, linear.base)


@torch.no_grad()
def loaded_error(model: PreTrainedModel, ids: Tensor, expected: Tensor) -> float:
    """Relative error of a loaded model's logits for the canary ``ids`` (1, 16); ``expected`` are (V,)."""
    logits = model(**inputs_of(model, ids)).logits
    return relative_error(logits.reshape(-1, logits.shape[-1])[-1].float().cpu(), expected)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()


def _require_mergeable(adapter: Adapter) -> None:
    if adapter.routing:
        raise UserError("export: the modules are chosen prompt by prompt, so no single weight equals them")
    for module in adapter.modules.values():
        if module.unmergeable:
            raise UserError(f"export: {module.unmergeable}, so no single weight equals them")
