"""What whole trainings of methods cost beside one another: processor time, steps a second, peak memory.

    python scripts/research/train_cost.py lora alora adalora sora [--rounds 3] [--set task=tiny_entailment …]

Every round trains each method once, in a process of its own; figures are medians over the rounds, and ratios to the
first method medians of those within a round. ``command`` is the processor time of the whole command, start-up, scores
and tests included; ``steps`` are steps for a second of training without the scores that a method takes in between.
Prints a table and writes docs/results/train_cost.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowrank_cli.runs import all_runs
from lowrank_cli.runs.provenance import cpu_name, git_state, package_versions

ROOT = Path(__file__).resolve().parents[2]


def train(method: str, overrides: list[str]) -> dict[str, float]:
    """One training: processor seconds of the command, steps a second, peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "lowrank_cli", "train", f"method={method}", *overrides, f"outputs={folder}"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (run,) = all_runs(Path(folder))
        metrics = run.metrics
        return {
            "command": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "steps": metrics["train/steps"] / (metrics["train/seconds"] - metrics.get("train/scoring_seconds", 0)),
            "memory": run.info["peak_memory_bytes"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=["task=tiny_entailment", "train.max_steps=200"])
    args = parser.parse_args()
    overrides = ["hardware.threads=1", *args.set]
    rounds = [{method: train(method, overrides) for method in args.methods} for _ in range(args.rounds)]
    first, rows = args.methods[0], {}
    for method in args.methods:
        rows[method] = {key: statistics.median(round[method][key] for round in rounds) for key in rounds[0][method]}
        for key in list(rows[method]):
            rows[method][f"{key}_ratio"] = statistics.median(round[method][key] / round[first][key] for round in rounds)
    table = Table("method", "processor s", "ratio", "steps/s", "ratio", "peak MB", "ratio")
    for method, row in rows.items():
        cells = [
            f"{row['command']:.1f}",
            f"{row['command_ratio']:.2f}",
            f"{row['steps']:.2f}",
            f"{row['steps_ratio']:.2f}",
        ]
        table.add_row(method, *cells, f"{row['memory'] / 1e6:.0f}", f"{row['memory_ratio']:.2f}")
    Console().print(table)
    about = {"git": git_state(), "machine": cpu_name(), "packages": package_versions()}
    record = {"overrides": overrides, **about, "rows": rows, "rounds": rounds}
    (ROOT / "docs" / "results" / "train_cost.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
