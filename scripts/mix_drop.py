"""What training on a mix of tasks costs each method, against training on each task alone (MiLoRA, multi-task table).

    python scripts/mix_drop.py scripts/suites/milora.yaml --outputs DIR [--group bundled] [--mix mix]

Reads the runs of scripts/evidence.py. A drop is, for each part of the mix and each seed, test metric alone minus test
metric in the mix. Prints, and writes to docs/results/<suite>/<group>/mix_drop.json, by method: the medians over
seeds by part, the mean drop with its sign-flip test over parts and seeds, and the baseline's drop beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from lowrank_cli.report.statistics import sign_flip_test
from lowrank_cli.runs.provenance import git_state

ROOT = Path(__file__).resolve().parents[1]


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Seed → metrics of the finished runs below ``folder``."""
    found = {}
    for file in sorted(folder.rglob("metrics.json")):
        info = json.loads((file.parent / "run.json").read_text())
        if "latest" not in file.parts and info["status"] == "done":
            found[info["seed"]] = json.loads(file.read_text())
    return found


def drops(runs: Path, method: str, mix: str, parts: dict[str, str], metric: str) -> dict:
    """``parts``: name of a part in the mix → name of the single task's folder."""
    mixed = metrics(runs / mix / method)
    record: dict = {"parts": {}}
    pooled = []
    for part, folder in parts.items():
        alone = metrics(runs / folder / method)
        seeds = sorted(alone.keys() & mixed.keys())
        single = [alone[seed][f"test/{metric}"] for seed in seeds]
        together = [mixed[seed][f"test/{part}/{metric}"] for seed in seeds]
        pooled += [a - b for a, b in zip(single, together, strict=True)]
        record["parts"][part] = {"alone": single, "mix": together, "seeds": seeds}
    return record | {"mean_drop": statistics.mean(pooled), "pairs": len(pooled), "p_value": sign_flip_test(pooled)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--outputs", type=Path, required=True, help="as given to evidence.py")
    parser.add_argument("--group", default="bundled")
    parser.add_argument("--mix", default="mix", help="the suite's task that is the mix")
    parser.add_argument("--metric", default="accuracy")
    args = parser.parse_args()
    suite = yaml.safe_load(args.suite.read_text())
    tasks = suite["groups"][args.group]["tasks"]
    names = {
        name: next(o.split("=")[1] for o in overrides if o.startswith("task=")) for name, overrides in tasks.items()
    }
    parts = {task: name for name, task in names.items() if name != args.mix}
    runs = args.outputs / "runs" / args.group
    found = {method: drops(runs, method, args.mix, parts, args.metric) for method in suite["methods"]}
    record = {"command": f"python scripts/mix_drop.py {args.suite}", "git": git_state(), "methods": found}
    target = ROOT / "docs" / "results" / args.suite.stem / args.group / "mix_drop.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    table = Table("method", *(f"{part}: alone → mix" for part in parts), "mean drop", "p")
    for method, result in found.items():
        medians = [
            f"{statistics.median(cell['alone']):.3f} → {statistics.median(cell['mix']):.3f}"
            for cell in result["parts"].values()
        ]
        table.add_row(method, *medians, f"{result['mean_drop']:+.4f}", f"{result['p_value']:.3g}")
    Console().print(table)


if __name__ == "__main__":
    main()
