"""Exact ablation scores of ranks or modules, many in each forward pass.

AB-LoRA (Liu et al., NAACL 2024, arXiv 2403.16187, section 3.3): S(M) of the whole adapter, S(M∖i) without rank
i, S(M_i) with rank i as the only one in the model.

Gates can differ between the rows of a batch, so V copies of n examples evaluate V ablations at once, with the same
results as one by one. Layers before the ablated one, and what its own layer computes before it, are reused from one
pass of the whole adapter (for S(M∖i)) or of the bare model (for S(M_i)).

Cost: 2 · ranks ablations. To be exact, each must run all layers after the ablated one again, at all positions, since
attention mixes them. With L equal layers that is (L − 1) / 2 of them on average, the last one without feed-forward and
LM head except at answer positions, and the rest of the ablated layer. On the bundled model (L = 6) an ablation takes
0.28 of the operations of a padded pass, as at 100M parameters (L = 12): at most 3.6 times as fast as the loop. Measured
on one core it is 2.4 and 2.3 times (docs/results/bench_score_*.json), because attention and elementwise
operations, 45 % of the time there, still run at all positions of the last layer. Batching saves no operations, it only
fills a GPU. ``taylor`` is faster still.

Rounding: with bf16 weights a score has an error of 0.004 to 0.009 nats (rms, bundled model, 12 to 16 examples), so the
order of less important ranks is arbitrary; ``taylor`` had 0.001 for the least important ranks, and fp32 has 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.lm_head import replaced_forwards
from lowrank_cli.errors import UserError
from lowrank_cli.scoring.probe import Batch, Probe, answered_rows, repeated, row_lengths, row_losses
from lowrank_cli.scoring.reuse import ROLE_ORDER, Reuse

Unit = tuple[str, int | None]  #: a module's key and one of its ranks; None: the whole module


@dataclass
class Ablations:
    """S under all ablations."""

    whole: float  #: S(M), with the whole adapter
    bare: float  #: S(M_0), without low-rank modules
    without: dict[Unit, float]  #: S(M∖i), without the unit
    alone: dict[Unit, float]  #: S(M_i), with only the unit


def ranks_of(adapter: Adapter) -> list[Unit]:
    """All ranks of the adapter, as units."""
    return [(key, rank) for key, module in adapter.modules.items() for rank in range(module.rank)]


@torch.no_grad()
def ablate(adapter: Adapter, probe: Probe, units: Sequence[Unit]) -> Ablations:
    """Measure S for every unit. Raises UserError if modules are chosen prompt by prompt."""
    if adapter.routing is not None:
        raise UserError("score: the modules of this adapter are chosen prompt by prompt; ranks are not ablated there")
    losses = torch.zeros(2, len(units) + 1, dtype=torch.float64, device=adapter.model.device)
    by_depth = units_by_depth(adapter, units)
    with evaluating(adapter), probe.autocast():
        for batch in probe.groups():
            for alone in (False, True):
                with all_skipped(adapter) if alone else nullcontext():
                    sums = losses[int(alone)]
                    reuse = Reuse(adapter, batch)
                    sums[-1] += reuse.losses.sum()
                    for depth, members in by_depth.items():
                        ablate_units(adapter, probe, reuse, depth, units, members, alone, sums)
    means = (-probe.add_up(losses) / probe.weight()).tolist()
    removed, kept = (dict(zip(units, row[:-1], strict=True)) for row in means)
    return Ablations(means[0][-1], means[1][-1], removed, kept)


Depth = tuple[int | None, int]  #: layer, and order of computation within it


def units_by_depth(adapter: Adapter, units: Sequence[Unit]) -> dict[Depth, list[int]]:
    """Indices of the units that can share a pass, from the first layer to the last."""
    by_depth: dict[Depth, list[int]] = {}
    for position, (key, _) in enumerate(units):
        site = adapter.sites[key]
        known = site.layer is not None and site.role is not None
        by_depth.setdefault((site.layer, ROLE_ORDER[str(site.role)]) if known else (None, 0), []).append(position)
    return dict(sorted(by_depth.items(), key=lambda item: (-1 if item[0][0] is None else item[0][0], item[0][1])))


def ablate_units(
    adapter: Adapter,
    probe: Probe,
    reuse: Reuse,
    depth: Depth,
    units: Sequence[Unit],
    members: list[int],
    alone: bool,
    sums: Tensor,
    measure: Callable[[PreTrainedModel, Batch], Tensor] = row_losses,
) -> None:
    """Ablate the ``members`` (indices into ``units``) at one depth, and add the results to ``sums``.

    A pass holds as many copies of the batch as ``probe.tokens`` allows, one after the other.

    Args:
        reuse: a pass of the batch without ablations.
        alone: keep only the unit, instead of removing it.
        sums: (units,), sums over rows.
        measure: gives the value of each row of a batch.
    """
    layer, order = depth
    lengths = row_lengths(reuse.batch)
    rows = len(lengths)
    copies = max(1, probe.tokens // (rows * max(lengths)))
    for start in range(0, len(members), copies):
        chosen = members[start : start + copies]
        ablated = [units[position] for position in chosen]
        paths = {adapter.sites[key].path for key, _ in ablated}
        known, batch = reuse.known(layer, order, paths, len(chosen)), repeated(reuse.batch, len(chosen))
        narrow = layer == reuse.last and order > ROLE_ORDER["O"]
        with _gated(adapter, ablated, rows, alone, answered_rows(batch) if narrow else None), replaced_forwards(known):
            values = measure(adapter.model, batch)  # (V * n,)
        sums[chosen] += values.view(len(chosen), rows).sum(dim=1, dtype=torch.float64)
        probe.tick(len(values))


@contextmanager
def _gated(
    adapter: Adapter, ablated: Sequence[Unit], rows: int, alone: bool, positions: Tensor | None
) -> Iterator[None]:
    """Set row gates for ``len(ablated)`` copies of ``rows`` rows: each copy lacks its unit, or has only that one.

    ``positions`` (N,) are the batch rows of single positions, for linears that read these; None if they read all.
    """
    modules = {key: adapter.modules[key] for key, _ in ablated}
    before = {key: (module.rank_gate, module.skip) for key, module in modules.items()}
    for key, module in modules.items():
        gate = torch.full((len(ablated), module.rank), float(not alone), device=module.lora_a.device)  # (V, R)
        for copy, (other, rank) in enumerate(ablated):
            if other == key:
                gate[copy, slice(None) if rank is None else rank] = float(alone)
        gate = gate.repeat_interleave(rows, dim=0)  # (V, R) -> (V * n, R)
        module.rank_gate = gate if positions is None else gate[positions]  # (N, R)
        module.skip = False
    try:
        yield
    finally:
        for key, module in modules.items():
            module.rank_gate, module.skip = before[key]


@contextmanager
def all_skipped(adapter: Adapter) -> Iterator[None]:
    """Skip every low-rank module inside, where single ones may be switched on again (:func:`_gated`).

    :meth:`Adapter.disabled` runs the bare model instead, in which no module can be switched on.
    """
    before = {key: module.skip for key, module in adapter.modules.items()}
    try:
        for module in adapter.modules.values():
            module.skip = True
        yield
    finally:
        for key, skip in before.items():
            adapter.modules[key].skip = skip


@contextmanager
def evaluating(adapter: Adapter) -> Iterator[None]:
    """Disable dropout inside, and restore the mode afterwards."""
    training = adapter.model.training
    adapter.model.train(False)
    try:
        yield
    finally:
        adapter.model.train(training)
