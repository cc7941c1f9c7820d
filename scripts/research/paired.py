"""One method of a suite against each of the others: paired by task and seed, over the runs of evidence.py.

    python scripts/research/paired.py scripts/research/suites/lelora.yaml lelora --outputs DIR [--metric accuracy]
    python scripts/research/paired.py scripts/research/suites/lelora.yaml lelora --outputs DIR --metric dev/loss

A metric is one of the test split, or named with its split; of losses the logarithms are compared, so that a difference
of −0.1 is about 10 % less, whatever the task. Where the suite has ``pools`` (name: methods), the mean of these methods
by seed is one more method to compare with.

Prints, and writes to docs/results/<suite>/<group>/paired.json (paired-dev-loss.json, …), for each group and each other
method: by task the medians, their intervals and the mean difference with its sign-flip test; and the test over all
tasks together, twice: over every pair, and over the means by seed. Where the tasks of a seed share what was prepared
for it (FanLoRA's setting) their pairs are not independent, and only the second holds; five seeds cannot bring it below
0.0625.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import yaml

from lowrank_cli.report.statistics import median_interval, sign_flip_test
from lowrank_cli.runs import all_runs
from lowrank_cli.runs.provenance import git_state

ROOT = Path(__file__).resolve().parents[2]


def values(folder: Path, metric: str) -> dict[int, float]:
    """Seed → metric (of a mix of tasks: the mean over them; the logarithm of a loss) of the finished runs."""
    done = [run for run in all_runs(folder) if run.done]
    if "/" not in metric:
        return {run.info["seed"]: run.metrics.get(f"test/{metric}", run.metrics.get("test/mean")) for run in done}
    scale = math.log if metric.endswith("loss") else float
    return {run.info["seed"]: scale(run.metrics[metric]) for run in done}


def pooled_values(task: Path, methods: list[str], metric: str) -> dict[int, float]:
    """Seed → mean over ``methods``, for the seeds that all of them have."""
    found = [values(task / method, metric) for method in methods]
    seeds = set.intersection(*(set(own) for own in found))
    return {seed: statistics.mean(own[seed] for own in found) for seed in sorted(seeds)}


def against(tasks: list[Path], method: str, others: list[str], metric: str) -> dict:
    """The comparison of a method with another, or with several as one, over the tasks of a group."""
    record: dict = {"tasks": {}}
    pooled = []
    by_seed: dict[int, list[float]] = {}
    for task in tasks:
        ours, theirs = values(task / method, metric), pooled_values(task, others, metric)
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            continue
        differences = [ours[seed] - theirs[seed] for seed in seeds]
        pooled += differences
        for seed, difference in zip(seeds, differences, strict=True):
            by_seed.setdefault(seed, []).append(difference)
        record["tasks"][task.name] = {
            "seeds": seeds,
            "medians": [statistics.median(ours.values()), statistics.median(theirs.values())],
            "intervals": [median_interval(list(ours.values())), median_interval(list(theirs.values()))],
            "mean_difference": statistics.mean(differences),
            "p_value": sign_flip_test(differences),
        }
    if pooled:
        record |= {
            "pairs": len(pooled),
            "mean_difference": statistics.mean(pooled),
            "p_value": sign_flip_test(pooled),
            "p_value_by_seed": sign_flip_test([statistics.mean(own) for own in by_seed.values()]),
        }
    return record


def shown(p_value: float | None) -> str:
    """A p-value to read; a dash where there are too few values for one."""
    return "–" if p_value is None else f"{p_value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("method")
    parser.add_argument("--outputs", type=Path, required=True, help="as given to evidence.py")
    parser.add_argument("--metric", default="accuracy")
    args = parser.parse_args()
    suite = yaml.safe_load(args.suite.read_text())
    made = git_state()  # before the first result changes it
    for group in suite["groups"]:
        folder = args.outputs / "runs" / group
        if not folder.is_dir():
            continue
        tasks = sorted(path for path in folder.iterdir() if path.is_dir())
        others = {name: [name] for name in suite["methods"] if name != args.method} | suite.get("pools", {})
        found = {name: against(tasks, args.method, other, args.metric) for name, other in others.items()}
        record = {
            "command": f"python scripts/research/paired.py {args.suite.name} {args.method} --metric {args.metric}",
            "git": made,
            "against": found,
        }
        name = "paired" if args.metric == "accuracy" else f"paired-{args.metric.replace('/', '-')}"
        target = ROOT / "docs" / "results" / args.suite.stem / group / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        for other, result in found.items():
            if "pairs" in result:
                print(
                    f"{group}: {args.method} − {other}: {result['mean_difference']:+.4f} "
                    f"over {result['pairs']} pairs, p = {shown(result['p_value'])}, "
                    f"by seed {shown(result['p_value_by_seed'])}"
                )


if __name__ == "__main__":
    main()
