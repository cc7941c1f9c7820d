"""How far cheap scores of an adapter agree with exact ones, where exact ones of all ranks would take hours.

    python scripts/research/score_agreement.py RUN --sample 70 --output FILE.json
    python scripts/research/score_agreement.py RUN --level module --sample 6 --output FILE.json

``taylor`` and ``magnitude`` score everything; the exact kind scores a sample drawn by the seed: 70 ranks of the model,
or all modules of 6 layers. The sample is ordered and cut off as if it were all there is: an eighth of the ranks goes
(as many as modules, at rank 8), two modules of each layer stay. Of ``mixed`` nothing need be run: it takes from these
exact scores those in its window. Written: Spearman's correlation with the exact scores, the share of what is pruned
that exact scores prune too, and processor seconds of each kind.

Exact scores are kept in FILE.json.part as they come: the same command goes on from there. Use one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.config.composition import compose
from lowrank_cli.runs.provenance import cpu_name, git_state, package_versions
from lowrank_cli.scoring import cost, module_scores, rank_scores
from lowrank_cli.scoring.ablation import Unit, ablate
from lowrank_cli.scoring.cut import Cut, usual
from lowrank_cli.scoring.probe import Probe
from lowrank_cli.stages.score import adapted, trained_tokens

CHUNK = 20  #: units between two savings
WINDOWS = (0.05, 0.1, 0.2, 0.3, 0.5)

Rows = dict[str, list[float]]


def spearman(one: list[float], other: list[float]) -> float:
    """Rank correlation."""
    ranks = torch.tensor([one, other]).argsort(dim=1).argsort(dim=1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def exact_scores(adapter: Adapter, probe: Probe, units: Sequence[Unit], part: Path) -> tuple[Rows, float]:
    """[S(M) − S(M∖i)], [S(M_i) − S(M_0)] of each unit, and the processor seconds that all of them took."""
    known = json.loads(part.read_text()) if part.is_file() else {"seconds": 0.0, "terms": {}}
    left = [unit for unit in units if str(unit) not in known["terms"]]
    for start in range(0, len(left), CHUNK):
        began, chunk = time.process_time(), left[start : start + CHUNK]
        found = ablate(adapter, probe, chunk)
        known["seconds"] += time.process_time() - began
        for unit in chunk:
            known["terms"][str(unit)] = [found.whole - found.without[unit], found.alone[unit] - found.bare]
        part.write_text(json.dumps(known))
        print(f"{start + len(chunk)} of {len(left)} exact scores, {known['seconds']:.0f} s", flush=True)
    return {str(unit): known["terms"][str(unit)] for unit in units}, known["seconds"]


def cheap_scores(level: str, kind: str, adapter: Adapter, probe: Probe) -> tuple[rank_scores.Scores, float]:
    """Scores of every unit, and the processor seconds that they took."""
    began = time.process_time()
    scores = (
        module_scores.score(kind, adapter, probe, 0) if level == "module" else rank_scores.score(kind, adapter, probe)
    )
    return scores, time.process_time() - began


def pruned(values: Mapping[str, Sequence[float]], cut: Cut) -> set[tuple[str, int]]:
    """The lowest units of each group, as many as go."""
    gone = []
    for keys, drop in cut.groups:
        places = sorted((values[key][index], key, index) for key in keys for index in range(len(values[key])))
        gone += places[:drop]
    return {(key, index) for _, key, index in gone}


def agreement(values: Rows, exact: Rows, cut: Cut) -> dict[str, float]:
    """Correlation with the exact scores, and the share of what they prune that is pruned."""
    both = [[value for row in rows.values() for value in row] for rows in (values, exact)]
    gone = pruned(exact, cut)
    return {"spearman": spearman(*both), "overlap": len(pruned(values, cut) & gone) / len(gone)}


def _sampled(cut: Cut, keys: Mapping[str, Any]) -> Cut:
    """The groups of a cut that are in the sample."""
    return Cut(cut.window, [(own, drop) for own, drop in cut.groups if own[0] in keys])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run with an adapter")
    parser.add_argument("--level", default="rank", choices=["rank", "module"])
    parser.add_argument("--sample", type=int, help="ranks, or layers of modules, scored exactly; all without it")
    for name, default in (("batch", 32), ("tokens", 1024), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    composed = compose("score", [f"run={args.run}"])
    session, adapter = adapted(composed.config, composed.adapter_run)
    probe, ranks = session.probe(args.batch, args.tokens), args.level == "rank"
    places = [(key, i) for key, rank in adapter.ranks().items() for i in range(rank if ranks else 1)]
    drawn = places if ranks else sorted({adapter.sites[key].layer or 0 for key in adapter.modules})
    drawn = set(random.Random(args.seed).sample(drawn, args.sample or len(drawn)))
    chosen = [place for place in places if (place if ranks else adapter.sites[place[0]].layer or 0) in drawn]
    taken: dict[str, list[int]] = {key: [i for own, i in chosen if own == key] for key, _ in chosen}
    units: dict[tuple[str, int], Unit] = {(key, i): (key, i if ranks else None) for key, i in chosen}
    cheap = {kind: cheap_scores(args.level, kind, adapter, probe) for kind in ("taylor", "magnitude")}
    print({kind: f"{seconds:.1f} s" for kind, (_, seconds) in cheap.items()}, flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    part = args.output.with_name(args.output.name + ".part")
    terms, seconds = exact_scores(adapter, probe, list(units.values()), part)
    exact = {key: [sum(terms[str(units[key, i])]) for i in own] for key, own in taken.items()}
    values = {
        kind: {key: [s.values[key][i] for i in own] for key, own in taken.items()} for kind, (s, _) in cheap.items()
    }
    keys = list(taken)
    cut = Cut(1.0, [(keys, len(chosen) // 8)]) if ranks else _sampled(usual(adapter, "module", 1.0), taken)
    measured = {(key, taken[key].index(i)): exact[key][taken[key].index(i)] for key, i in chosen}
    joined = {f"mixed, window {share}": Cut(share, cut.groups).joined(values["taylor"], measured) for share in WINDOWS}
    single = {name: {key: [terms[str(units[key, i])][at] for i in own] for key, own in taken.items()}
              for at, name in enumerate(("the term without", "the term alone"))}  # fmt: skip
    share = cost.costs(adapter, args.level, probe, usual(adapter, args.level, 0.1))
    budget = (1 + cost.BACKWARD) * trained_tokens(session)
    record: dict[str, Any] = {
        "command": "python scripts/research/score_agreement.py",
        "settings": {key: value for key, value in vars(args).items() if key not in ("run", "output")},
        "commit": git_state(),
        "machine": cpu_name(),
        "packages": package_versions(),
        "units": len(places),
        "scored_exactly": len(chosen),
        "batch": {"rows": probe.rows, "tokens": int(probe.batch["attention_mask"].sum())},
        "processor_seconds": {kind: spent for kind, (_, spent) in cheap.items()}
        | {"exact, a unit": seconds / len(chosen)},
        "cost_by_operations_of_this_training": {kind: passes / budget for kind, passes in share.items()},
        "pruned_by_chance": sum(drop for _, drop in cut.groups) / len(chosen),
        "with_exact": {name: agreement(rows, exact, cut) for name, rows in (values | joined | single).items()},
        "exact": terms,
        "taylor": {str(unit): values["taylor"][key][taken[key].index(i)] for (key, i), unit in units.items()},
    }
    args.output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    part.unlink()
    print(json.dumps({key: record[key] for key in ("processor_seconds", "with_exact")}, indent=2))


if __name__ == "__main__":
    main()
