"""``lrk bench score``: the cost of scoring all ranks, exactly (one at a time or together) and approximately.

One at a time, the model runs twice for each rank, without it and with it alone (here for a sample of ranks, from whose
mean the total is extrapolated). Together is what ``lrk score`` does: many ablations share a pass, and the layers below
the ablated one run once. Both give the same scores; ``bench.json`` has their largest difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.lm_head import answer_losses
from lowrank_cli.bench.base_model import BaseModel, autocast, load_base
from lowrank_cli.bench.bench_models import adapted_copy
from lowrank_cli.bench.entries import available_methods
from lowrank_cli.bench.examples import Batch, batch_of, described
from lowrank_cli.bench.rounds import interleaved
from lowrank_cli.bench.timings import Timing, figures, metrics, rows, timed
from lowrank_cli.errors import UserError
from lowrank_cli.runs import Run, progress
from lowrank_cli.schema import BenchRun, MethodConfig, ScoreBench
from lowrank_cli.scoring import rank_scores
from lowrank_cli.scoring.ablation import ranks_of
from lowrank_cli.scoring.probe import Probe

__all__ = ["figures", "measure", "metrics"]

APPROXIMATE = ("taylor", "magnitude")  #: approximate kinds of score
Rank = tuple[str, int]  #: key of a module, and one of its ranks


def measure(config: BenchRun, run: Run) -> dict[str, Any]:
    """Rows of each method; times are relative to its ranks one at a time."""
    base = load_base(config, run)
    batch = batch_of(config, base)
    record: dict[str, Any] = {"rows": [], "notes": [], "largest_difference": {}, "fewer_operations": {}}
    variants = available_methods(config)
    total = len(variants) * (config.bench.rounds + 1) * (2 + len(APPROXIMATE))
    with autocast(config), progress.bar("measuring", total, shown=True) as bar:
        for entry, variant in variants.items():
            assert variant is not None
            _measure(entry, variant, base, batch, config, bar, record)
    title = f"Scores of all ranks on {described(batch, config)}"
    return {**base.facts, "title": title, "data": described(batch, config), **record}


def _measure(
    entry: str,
    variant: MethodConfig,
    base: BaseModel,
    batch: Batch,
    config: BenchRun,
    bar: progress.Bar,
    record: dict[str, Any],
) -> None:
    """Measure one method, and add the results to ``record``."""
    bench = config.bench
    assert isinstance(bench, ScoreBench)
    adapter = adapted_copy(base.model, entry, variant, config.seed).adapter
    assert adapter is not None
    try:
        rank_scores.require_ranks(adapter)
    except UserError:
        raise UserError(f"bench.methods: '{entry}' has no ranks that can be scored one by one") from None
    inputs = {key: value for key, value in batch.items() if key != "prompt_mask"}
    probe = Probe(inputs, bench.tokens)
    ranks = [(key, rank) for key, rank in ranks_of(adapter) if rank is not None]
    sample = ranks[:: max(1, len(ranks) // bench.sample)][: bench.sample]
    results: dict[str, Any] = {}

    def time(name: str, work: Callable[[], object], factor: float = 1.0) -> Timing:
        def keep() -> None:
            results[name] = work()

        return timed(keep, base.device).scaled(factor)

    names = [f"{entry}: {way}" for way in ("one at a time", "together", *APPROXIMATE)]
    single = partial(time, names[0], partial(one_at_a_time, adapter, inputs, sample), len(ranks) / len(sample))
    together = partial(time, names[1], partial(rank_scores.score, "ab", adapter, probe))
    work = {names[0]: single, names[1]: together}
    for name, kind in zip(names[2:], APPROXIMATE, strict=True):
        work[name] = partial(time, name, partial(rank_scores.score, kind, adapter, probe))
    samples = interleaved(work, bench.rounds, bar)
    exact: rank_scores.Scores = results[names[1]]
    differences = [
        abs(value - exact.components[component][key][rank])
        for component, values in zip(("without", "alone"), results[names[0]], strict=True)
        for (key, rank), value in zip(sample, values, strict=True)
    ]
    plain = operations(partial(one_at_a_time, adapter, inputs, sample[:1])) * len(ranks)
    fewer = plain / operations(partial(rank_scores.score, "ab", adapter, probe))
    record["rows"] += rows(samples, names[0], ranks=len(ranks))
    record["largest_difference"][entry] = max(differences)
    record["fewer_operations"][entry] = fewer
    record["notes"].append(
        f"{entry}: {len(ranks)} ranks, {len(sample)} of them one at a time; both ways differ by {max(differences):.1e} "
        f"at most; together take {fewer:.2f} × fewer operations in matrix products"
    )


@torch.no_grad()
def one_at_a_time(adapter: Adapter, batch: Batch, ranks: Sequence[Rank]) -> tuple[list[float], list[float]]:
    """S(M∖i) and S(M_i) of each of ``ranks``: the negative mean loss without it, and with it alone."""
    scores: tuple[list[float], list[float]] = ([], [])
    try:
        for alone, values in enumerate(scores):
            for key, rank in ranks:
                for other, module in adapter.modules.items():
                    gate = torch.full_like(module.lora_a[:, 0], float(not alone))  # (R, I) -> (R,)
                    if other == key:
                        gate[rank] = float(alone)
                    module.rank_gate = gate
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                values.append(-answer_losses(adapter.model, inputs, batch["labels"]).mean().item())
    finally:
        for module in adapter.modules.values():
            module.rank_gate = None
    return scores


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in ``work``."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
