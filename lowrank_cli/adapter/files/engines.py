"""LoRAs in the form that an inference engine takes, or a refusal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.target_sites import SHARED_INPUTS, Site, head_names, known_sites
from lowrank_cli.errors import UserError

Loras = dict[str, tuple[Tensor, Tensor]]  #: B (O, R) and A (R, I) with scale 1, by the path of their linear

#: Last names of the linears that SGLang gives LoRA buffers in every decoder (get_hidden_dim in srt/lora/utils.py).
SGLANG_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def require_no_head(adapter: Adapter, engine: str) -> None:
    """Raise UserError if ``adapter`` includes a module trained in full, which ``engine`` does not load."""
    if heads := head_names(adapter.model):
        raise UserError(
            f"export.target: {engine} serves LoRAs of decoders, and '{heads[0]}' of this classifier is trained in "
            f"full (allowed: peft; or export.format=merged)"
        )


@torch.no_grad()
def for_sglang(adapter: Adapter, loras: Loras) -> Loras:
    """``loras`` with one rank, as SGLang takes no rank patterns: smaller ones are padded with zeros.

    SGLang packs linears that read the same input (Q, K, V and G, U) and stacks their LoRAs: where one of them has a
    LoRA, the others get one too, of zeros.

    Raises:
        UserError: SGLang has no LoRA for one of the linears, or for a classification head.
    """
    require_no_head(adapter, "sglang")
    if other := next((path for path in loras if not path.endswith(tuple(f".{name}" for name in SGLANG_LINEARS))), None):
        raise UserError(
            f"export.target: sglang has LoRAs for {', '.join(SGLANG_LINEARS)}, and this adapter has one for '{other}' "
            f"(allowed: peft; or export.format=merged)"
        )
    sites, rank = known_sites(adapter.model), max(len(a) for _, a in loras.values())
    packed = {_packed(site) for site in sites if site.path in loras}
    fitted: Loras = {}
    for site in sites:
        if _packed(site) in packed:
            like, _ = next(iter(loras.values()))
            fitted[site.path] = like.new_zeros(site.out_features, rank), like.new_zeros(rank, site.in_features)
    for path, (b, a) in loras.items():
        missing = rank - len(a)
        fitted[path] = F.pad(b, (0, missing)), F.pad(a, (0, 0, 0, missing))  # (O, r) -> (O, R), (r, I) -> (R, I)
    return fitted


def _packed(site: Site) -> tuple[int | None, str]:
    """What identifies the linear into which SGLang packs the one at ``site``: the layer, and the packed roles."""
    role = site.role or ""
    return site.layer, next((roles for roles in SHARED_INPUTS if role in roles), role)
