"""What training on a mix of tasks costs each method, against training on each task alone (MiLoRA, multi-task table).

    python scripts/research/mix_drop.py STUDY_FOLDER [--group bundled] [--mix mix]

Reads the folder of ``lrk study study=milora``. A drop is test metric alone minus test metric in the mix, averaged over
the mix's parts for each seed; its sign-flip test, and that of its difference from the baseline's drop, are over the
seeds. Prints, and writes to mix_drop.json in the study's folder, the values by arm, part and seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowrank_cli.report.statistics import sign_flip_test
from lowrank_cli.runs import Run


def finished(folder: Path) -> list[Run]:
    """The finished runs of one arm on one task."""
    return [run for file in sorted(folder.glob("*/run.json")) if (run := Run.open(file.parent)).done]


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Seed → metrics of the finished runs in ``folder``."""
    return {run.info["seed"]: run.metrics for run in finished(folder)}


def drops(runs: Path, method: str, mix: str, parts: dict[str, str], metric: str) -> dict:
    """By part the values alone and in the mix, and by seed the drop; ``parts``: part → name of its single task."""
    mixed = metrics(runs / mix / method)
    alone = {part: metrics(runs / folder / method) for part, folder in parts.items()}
    seeds = sorted(set(mixed).intersection(*alone.values()))
    single = {part: [alone[part][seed][f"test/{metric}"] for seed in seeds] for part in parts}
    together = {part: [mixed[seed][f"test/{part}/{metric}"] for seed in seeds] for part in parts}
    by_seed = [statistics.mean(single[part][i] - together[part][i] for part in parts) for i in range(len(seeds))]
    return {"seeds": seeds, "alone": single, "mix": together, "drop": by_seed, "p_value": sign_flip_test(by_seed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("--group", default="bundled")
    parser.add_argument("--mix", default="mix", help="the study's task that is the mix")
    parser.add_argument("--metric", default="accuracy")
    args = parser.parse_args()
    study = Run.open(args.study).read_json("study.json")
    runs = args.study / "runs" / args.group
    parts = {
        finished(runs / task / study["baseline"])[0].config()["task"]["name"]: task
        for task in study["groups"][args.group]
        if task != args.mix
    }
    found = {method: drops(runs, method, args.mix, parts, args.metric) for method in study["arms"]}
    reference = dict(zip(found[study["baseline"]]["seeds"], found[study["baseline"]]["drop"], strict=True))
    for result in found.values():
        pairs = zip(result["seeds"], result["drop"], strict=True)
        differences = [drop - reference[seed] for seed, drop in pairs if seed in reference]
        result["against_baseline"] = {"differences": differences, "p_value": sign_flip_test(differences)}
    record = {"baseline": study["baseline"], "methods": found}
    (args.study / "mix_drop.json").write_text(json.dumps(record, indent=1) + "\n")
    table = Table(
        *("method", *(part.removeprefix("tiny_") for part in parts), "drop", "p", f"−{study['baseline']}", "p"),
        title=f"Median {args.metric} in %, alone→in the mix; mean drop in points",
        box=None,
    )
    for method, result in found.items():
        if not result["seeds"]:
            continue
        medians = [
            "→".join(f"{100 * statistics.median(result[place][part]):.1f}" for place in ("alone", "mix"))
            for part in parts
        ]
        numbers = [f"{100 * statistics.mean(result['drop']):+.1f}", f"{result['p_value']:.3f}"]
        if method != study["baseline"]:
            against = result["against_baseline"]
            numbers += [f"{100 * statistics.mean(against['differences']):+.1f}", f"{against['p_value']:.3f}"]
        table.add_row(method, *medians, *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
