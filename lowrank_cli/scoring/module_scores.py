"""Scores of whole modules: those a selection is made by, and the baselines it is compared with.

The abstract of Tian et al. (EMNLP 2024 Industry Track) names "a novel importance scoring method" without its formula,
so the formulas are a reconstruction.
With M the whole adapter, M_0 none of its modules (a classification head stays as trained), M∖m all but module m, M_m
module m alone, g_m a gate on module m, and S = −(mean cross-entropy over response tokens, of an encoder over examples):

    ablation    nats    [S(M) − S(M∖m)] + [S(M_m) − S(M_0)]: the loss without m, and the gain from m alone
    kl          nats    mean KL(p_M ‖ p_{M∖m}) over response tokens, without their labels
    taylor      nats    ∂S/∂g_m at g = 1, plus that at g = 0: the ablation to first order, in two backward passes in all
    mixed       nats    the ablation for the modules near the cut, taylor for the others
    magnitude   ratio   E‖s · B A x‖ / E‖W x‖ over tokens x; the taylor baseline
    random      0 to 1  numbers drawn by the seed; the control
"""

from __future__ import annotations

from functools import partial
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.lm_head import headless, output_layer
from lowrank_cli.errors import require_choice
from lowrank_cli.schema import MODULE_KINDS
from lowrank_cli.scoring import gradients
from lowrank_cli.scoring.ablation import Unit, ablate, ablate_units, evaluating, units_by_depth
from lowrank_cli.scoring.cut import Cut
from lowrank_cli.scoring.probe import Probe, answers_of, row_divergences
from lowrank_cli.scoring.rank_scores import Scores, refined, require_ranks
from lowrank_cli.scoring.reuse import Reuse


def score(kind: str, adapter: Adapter, probe: Probe, seed: int, cut: Cut | None = None) -> Scores:
    """One score for each module, higher is more important.

    Args:
        seed: of ``random``.
        cut: ``mixed`` is exact near it.
    """
    require_choice("score.kind", kind, MODULE_KINDS)
    require_ranks(adapter)
    if kind == "ablation":
        ablations = ablate(adapter, probe, _all_modules(adapter))
        without, alone = (
            {key: [by_unit[key, None]] for key in adapter.modules} for by_unit in (ablations.without, ablations.alone)
        )
        values = {key: [ablations.whole - without[key][0] + alone[key][0] - ablations.bare] for key in adapter.modules}
        return Scores(kind, values, {"without": without, "alone": alone}, ablations.whole, ablations.bare, "module")
    if kind in ("taylor", "mixed"):  # a module's gate multiplies all its ranks, so its derivative is their sum
        slope_at_1, slope_at_0 = (
            {k: [v.double().sum().item()] for k, v in of.items()} for of in gradients.taylor(adapter, probe)
        )
        values = {key: [slope_at_1[key][0] + slope_at_0[key][0]] for key in adapter.modules}
        taylor = Scores("taylor", values, {"slope_at_1": slope_at_1, "slope_at_0": slope_at_0}, level="module")
        return refined(taylor, adapter, probe, cut) if kind == "mixed" else taylor
    if kind == "random":
        draw = Random(f"modules {seed}")
        return Scores(kind, {key: [draw.random()] for key in adapter.modules}, level="module")
    scores = divergences(adapter, probe) if kind == "kl" else magnitude(adapter, probe)
    return Scores(kind, {key: [value] for key, value in scores.items()}, level="module")


def rows_to_run(kind: str, adapter: Adapter, probe: Probe, cut: Cut | None = None) -> int:
    """The number of rows that ``probe.tick`` will count."""
    count = len(adapter.modules)
    near = cut.size(dict.fromkeys(adapter.modules, 1)) if cut else 0
    passes = {"ablation": 2 * count, "mixed": 2 + 2 * near, "kl": count, "taylor": 2, "magnitude": 1, "random": 0}
    return passes[kind] * probe.rows


def _all_modules(adapter: Adapter) -> list[Unit]:
    return [(key, None) for key in adapter.modules]


@torch.no_grad()
def divergences(adapter: Adapter, probe: Probe) -> dict[str, float]:
    """Mean KL(p_M ‖ p_{M∖m}) over response tokens (causal) or examples (encoder), in nats."""
    units = _all_modules(adapter)
    sums = torch.zeros(len(units), dtype=torch.float64, device=adapter.model.device)
    with evaluating(adapter), probe.autocast():
        for batch in probe.groups():
            reuse = Reuse(adapter, batch)
            reference = answers_of(adapter.model, batch)
            if output_layer(adapter.model) in adapter.linears.values():
                reference = reference.computed()  # before the head's own module is ablated
            measure = partial(row_divergences, reference=reference)
            for depth, members in units_by_depth(adapter, units).items():
                ablate_units(adapter, probe, reuse, depth, units, members, False, sums, measure)
    means = (probe.add_up(sums) / probe.weight()).tolist()
    return {key: value for (key, _), value in zip(units, means, strict=True)}


@torch.no_grad()
def magnitude(adapter: Adapter, probe: Probe) -> dict[str, float]:
    """E‖s · B A x‖ / E‖W x‖ over the inputs x of all tokens except padding, without dropout and bias.

    A linear called once for each example (an encoder's pooler) has one input for each.
    """
    sums = {key: torch.zeros(2, dtype=torch.float64, device=adapter.model.device) for key in adapter.modules}
    keys = {id(module): key for key, module in adapter.modules.items()}
    used = torch.empty(0)

    def add_norms(linear: AdaptedLinear, args: tuple, output: Tensor) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])  # (B, T, I) -> (B * T, I)
        x = x[used] if len(x) == len(used) else x  # (N, I)
        for module, _ in linear.updates:
            frozen = F.linear(x, module.frozen()[0].to(x.dtype))  # (N, I) -> (N, O)
            update = torch.zeros_like(frozen)
            module.add_to(update, x.unsqueeze(0))
            sums[keys[id(module)]] += torch.stack([value.double().norm(dim=1).sum() for value in (update, frozen)])

    hooks = [linear.register_forward_hook(add_norms) for linear in adapter.linears.values()]
    try:
        with evaluating(adapter), probe.autocast(), headless(adapter.model):
            for batch in probe.groups():
                if "attention_mask" in batch:  # images have no padding
                    used = batch["attention_mask"].flatten().bool()  # (B * T,)
                adapter.model(**{key: value for key, value in batch.items() if key != "labels"})
                probe.tick(len(batch["labels"]))
    finally:
        for hook in hooks:
            hook.remove()
    return {key: (own[0] / own[1]).item() for key, own in ((key, probe.add_up(pair)) for key, pair in sums.items())}
