"""The cost of scoring relative to training, and the choice of ``auto``: the best kind that costs little.

The unit is a forward pass of one token through the whole model. A backward pass counts as two, in training and in
``taylor``, so a training step costs three for each token on any machine. An exact score of a rank or module in layer l
of L (from 0) takes two passes, without it and with it alone, through that layer and the following ones: 2 (L − l) / L.
The rest is reused from two more passes, of the whole adapter and of the bare model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.scoring.cut import Cut
from lowrank_cli.scoring.probe import Probe, row_lengths

BACKWARD = 2  #: cost of a backward pass in forward passes
LIMIT = 0.1  #: share of the cost of training that all scorings together may take
EXACT = {"rank": "ab", "module": "ablation"}  #: the exact kind of each level


def costs(adapter: Adapter, level: str, probe: Probe, cut: Cut | None) -> dict[str, float]:
    """Cost of one scoring by each kind of ``auto``, best kind first, in forward passes of a token.

    ``mixed`` is included only with a ``cut``.
    """
    counts = adapter.ranks() if level == "rank" else dict.fromkeys(adapter.modules, 1)
    units = sum(counts.values())
    depth = 1 + max((site.layer for site in adapter.sites.values() if site.layer is not None), default=-1)
    behind = {key: 1.0 if (at := adapter.sites[key].layer) is None else (depth - at) / depth for key in counts}
    exact = 2 * sum(count * behind[key] for key, count in counts.items())
    taylor = 2.0 * (1 + BACKWARD)
    passes = {EXACT[level]: exact + 2}
    if cut is not None:
        passes["mixed"] = taylor + exact * cut.size(counts) / units + 2
    passes["taylor"] = taylor
    own = torch.tensor(sum(row_lengths(probe.batch)), device=probe.batch["labels"].device)
    tokens = probe.add_up(own).item()
    return {kind: count * tokens for kind, count in passes.items()}


def choose(costs: Mapping[str, float], training_tokens: float, times: int = 1) -> tuple[str, str]:
    """The best kind that costs less than :data:`LIMIT` of training, else the cheapest; and the reason in one line.

    Args:
        costs: of one scoring by each kind, best kind first.
        training_tokens: tokens that training reads.
        times: number of scorings.
    """
    shares = {kind: times * cost / ((1 + BACKWARD) * training_tokens) for kind, cost in costs.items()}
    cheapest = min(shares, key=lambda kind: shares[kind])
    kind = next((kind for kind, share in shares.items() if share < LIMIT), cheapest)
    dearer = ", ".join(f"{name} {_percent(share)}" for name, share in shares.items() if share > shares[kind])
    cost = f"{f'{times} scorings cost' if times > 1 else 'it costs'} {_percent(shares[kind])} of training"
    took = f"auto took {kind}{'' if shares[kind] < LIMIT else ', the cheapest'}"
    return kind, f"{took}: {cost}{f' ({dearer})' if dearer else ''}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"
