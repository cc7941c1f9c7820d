"""Measure the room between the bundled model as it is and as it can become, on every ``tiny_*`` task.

    python scripts/bundled_model/headroom.py --outputs DIR [--tasks tiny_sentiment …] [--parts zero shots full]

Each number is a run of the command line (zero-shot, ``--draws`` draws of 8 demonstrations, full fine-tuning)
on the test split. Run folders go to ``--outputs``; the numbers are merged into docs/results/headroom.json, and
the table of docs/results/bundled_model.md is printed from that file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from lowrank_cli.tasks import tiny

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "headroom.json"

#: accuracy of guessing; free answers cannot be guessed
CHANCE = {
    "tiny_yesno": 1 / 2,
    "tiny_choice": 1 / 4,
    "tiny_sentiment": 1 / 2,
    "tiny_entailment": 1 / 3,
    "tiny_topic": 1 / 4,
}

TRAINING = ["train.epochs=6", "train.max_steps=null", "train.eval_every=128", "train.checkpoint_every=0"]

#: part -> overrides of ``lrk``
PARTS = {
    "zero": ["evaluate", "method=none"],
    "shots": ["evaluate", "-m", "method=none", "evaluate.shots=8"],
    "full": ["train", "method=full", "train.learning_rate=1e-3", *TRAINING],
}


def command(part: str, task: str, draws: int) -> list[str]:
    """Arguments of ``lrk`` without the outputs folder."""
    arguments = [*PARTS[part], f"task={task}"]
    if part == "shots":
        arguments.append("seed=" + ",".join(map(str, range(draws))))
    return arguments


def metric(path: Path) -> tuple[str, float]:
    """Name and value of the task's own metric."""
    found = json.loads((path / "metrics.json").read_text())
    for name in ("accuracy", "number_match", "exact_match", "bleu"):
        if f"test/{name}" in found:
            return name, found[f"test/{name}"]
    raise SystemExit(f"{path}: no metric of the test split")


def measure(part: str, task: str, draws: int, outputs: Path) -> dict:
    """Run one part of one task in a folder of its own."""
    folder = outputs / f"{task}-{part}"
    arguments = command(part, task, draws)
    subprocess.run([sys.executable, "-m", "lowrank_cli", *arguments, f"outputs={folder}"], check=True, cwd=ROOT)
    runs = sorted(path.parent for path in folder.rglob("metrics.json") if "latest" not in path.parts)
    values = [metric(run) for run in runs]
    numbers = [value for _, value in values]
    about = [json.loads((run / "run.json").read_text()) for run in runs]
    return {
        "metric": values[0][0],
        "mean": statistics.mean(numbers),
        "values": numbers,
        "command": "lrk " + " ".join(arguments),
        "seconds": sum(info["seconds"] for info in about),
        "commit": about[0]["git"]["commit"],
        "device": about[0]["device"],
    }


def cell(found: dict | None) -> str:
    """One number, with the range where there are several."""
    if found is None:
        return ""
    scale = 1 if found["metric"] == "bleu" else 100
    text = f"{found['mean'] * scale:.1f}"
    if len(found["values"]) > 1:
        text += f" ({min(found['values']) * scale:.1f}–{max(found['values']) * scale:.1f})"
    return text


def table(results: dict) -> str:
    """The Markdown table."""
    lines = [
        "| task | metric | chance | zero-shot | 8-shot, mean (range) | full fine-tuning |",
        "|---" * 6 + "|",
    ]
    for task, parts in results.items():
        name = next(iter(parts.values()))["metric"]
        chance = f"{CHANCE[task] * 100:.1f}" if task in CHANCE else "0"
        cells = [cell(parts.get(part)) for part in ("zero", "shots", "full")]
        lines.append("| " + " | ".join([task, name, chance, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, required=True, help="new folder for the run folders")
    parser.add_argument("--tasks", nargs="+", default=tiny.NAMES, choices=tiny.NAMES)
    parser.add_argument("--parts", nargs="+", default=tuple(PARTS), choices=tuple(PARTS))
    parser.add_argument("--draws", type=int, default=5, help="draws of the demonstrations")
    args = parser.parse_args()
    results: dict = {}
    for part in args.parts:
        for task in args.tasks:
            found = measure(part, task, args.draws, args.outputs.absolute())
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results.setdefault(task, {})[part] = found
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            ordered = {task: results[task] for task in tiny.NAMES if task in results}
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
