"""Exact ablation scores of many ranks or modules, many in each forward pass.

AB-LoRA (ALoRA, Liu et al., NAACL 2024, arXiv 2403.16187, section 3.3): S(M) of the whole adapter, S(M∖i) without rank
i, S(M_i) with rank i as the only one in the model.

Each row of a batch may have gates of its own, so V copies of n examples evaluate V ablations at once, with the same
results as one by one. Layers in front of an ablated one, and what its own layer computes before it, are taken from
one pass of the whole adapter (for S(M∖i)) or of the bare model (for S(M_i)).

Cost: 2 · ranks ablations, each of which is exact only if every layer behind the ablated one runs again, at all
positions, since attention mixes them. With L equal layers that is (L − 1) / 2 of them on average, the last one
without feed-forward and LM head except where an answer is read, and what follows in the ablated layer itself. On the
bundled model (L = 6) an ablation takes 0.28 of the operations of a padded pass, at 100M parameters (L = 12) as much: at
most 3.6 times as fast as the loop. Measured on one core it is 2.4 and 2.3 (docs/results/bench_score_*.json), because
attention and what is computed element by element, 45 % of the time there, still run at all positions of the last
layer. Batching saves no operations, it only fills a GPU. For more there is ``taylor``.

Rounding: with bf16 weights a score has an error of 0.004 to 0.009 nats (rms, bundled model, 12 to 16 examples), so the
order of ranks that matter less is arbitrary; ``taylor`` had 0.001 where ranks matter least, and fp32 has 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.lm_head import replaced_forwards
from lowrank_cli.errors import UserError
from lowrank_cli.scoring.probe import Batch, Probe, answered_rows, repeated, row_losses
from lowrank_cli.scoring.reuse import STAGES, Reuse

Unit = tuple[str, int | None]  #: a module's key and one of its ranks; None is the whole module


@dataclass
class Ablations:
    """S with the whole adapter and without any, and, unit by unit, without it and with it alone."""

    whole: float
    bare: float
    without: dict[Unit, float]
    alone: dict[Unit, float]


def ranks_of(adapter: Adapter) -> list[Unit]:
    """Every live rank."""
    return [(key, rank) for key, part in adapter.modules.items() for rank in range(part.rank)]


@torch.no_grad()
def ablate(adapter: Adapter, probe: Probe, units: Sequence[Unit]) -> Ablations:
    """Measure S for every unit. Raises UserError where modules are chosen prompt by prompt."""
    if adapter.routing is not None:
        raise UserError("score: the modules of this adapter are chosen prompt by prompt; ranks are not ablated there")
    losses = torch.zeros(2, len(units) + 1, dtype=torch.float64, device=adapter.model.device)
    places = places_of(adapter, units)
    with evaluating(adapter), probe.autocast():
        for batch in probe.groups():
            for alone in (False, True):
                with closed(adapter) if alone else _as_it_is():
                    own = losses[int(alone)]
                    reuse = Reuse(adapter, batch)
                    own[-1] += reuse.losses.sum()
                    for place, members in places.items():
                        ablate_place(adapter, probe, reuse, place, units, members, alone, own)
    found = (-probe.add_up(losses) / probe.weight()).tolist()
    without, only = (dict(zip(units, row[:-1], strict=True)) for row in found)
    return Ablations(found[0][-1], found[1][-1], without, only)


Place = tuple[int | None, int]  #: layer, and stage within it


def places_of(adapter: Adapter, units: Sequence[Unit]) -> dict[Place, list[int]]:
    """Units (their positions) that may share a pass, from the first layer to the last."""
    places: dict[Place, list[int]] = {}
    for position, (key, _) in enumerate(units):
        site = adapter.sites[key]
        known = site.layer is not None and site.role is not None
        places.setdefault((site.layer, STAGES[str(site.role)]) if known else (None, 0), []).append(position)
    return dict(sorted(places.items(), key=lambda item: (-1 if item[0][0] is None else item[0][0], item[0][1])))


def ablate_place(
    adapter: Adapter,
    probe: Probe,
    reuse: Reuse,
    place: Place,
    units: Sequence[Unit],
    members: list[int],
    alone: bool,
    sums: Tensor,
    measure: Callable[[PreTrainedModel, Batch], Tensor] = row_losses,
) -> None:
    """Add what ``measure`` says of each row to the ``sums`` of all ``members``, as many in a pass as ``probe.tokens``
    allows; the copies of ``reuse.batch`` stand one behind the other."""
    layer, stage = place
    rows, length = reuse.batch["input_ids"].shape
    copies = max(1, probe.tokens // (rows * length))
    for start in range(0, len(members), copies):
        chosen = members[start : start + copies]
        ablated = [units[position] for position in chosen]
        paths = {adapter.sites[key].path for key, _ in ablated}
        known, batch = reuse.known(layer, stage, paths, len(chosen)), repeated(reuse.batch, len(chosen))
        narrow = layer == len(reuse.blocks) - 1 and stage > STAGES["O"]
        with _gated(adapter, ablated, rows, alone, answered_rows(batch) if narrow else None), replaced_forwards(known):
            found = measure(adapter.model, batch)  # (V * n,)
        sums[chosen] += found.view(len(chosen), rows).sum(dim=1, dtype=torch.float64)
        probe.tick(len(found))


@contextmanager
def _gated(
    adapter: Adapter, ablated: Sequence[Unit], rows: int, alone: bool, positions: Tensor | None
) -> Iterator[None]:
    """Row gates of ``len(ablated)`` copies of ``rows`` rows: each copy lacks its unit, or has it alone.

    ``positions`` (N,) are the rows that a linear sees which gets single positions; None where it gets all.
    """
    parts = {key: adapter.modules[key] for key, _ in ablated}
    before = {key: (part.rank_gate, part.skip) for key, part in parts.items()}
    for key, part in parts.items():
        gate = torch.full((len(ablated), part.rank), float(not alone), device=part.lora_a.device)  # (V, R)
        for copy, (other, rank) in enumerate(ablated):
            if other == key:
                gate[copy, slice(None) if rank is None else rank] = float(alone)
        gate = gate.repeat_interleave(rows, dim=0)  # (V, R) -> (V * n, R)
        part.rank_gate = gate if positions is None else gate[positions]  # (N, R)
        part.skip = False
    try:
        yield
    finally:
        for key, part in parts.items():
            part.rank_gate, part.skip = before[key]


@contextmanager
def closed(adapter: Adapter) -> Iterator[None]:
    """Every low-rank module off, one by one, so that some can be opened again."""
    before = {key: part.skip for key, part in adapter.modules.items()}
    try:
        for part in adapter.modules.values():
            part.skip = True
        yield
    finally:
        for key, skip in before.items():
            adapter.modules[key].skip = skip


@contextmanager
def evaluating(adapter: Adapter) -> Iterator[None]:
    """The model without dropout inside; its mode restored afterwards."""
    training = adapter.model.training
    adapter.model.eval()
    try:
        yield
    finally:
        adapter.model.train(training)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
