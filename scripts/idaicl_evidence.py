"""IDAICL against plain in-context learning and three calibrations on the bundled model, over many demonstration sets.

    python scripts/idaicl_evidence.py --outputs DIR [--tasks tiny_sentiment …] [--draws 10] [--shots 4 8 12]
        [--templates 3] [--set KEY=VALUE …]

For each task ``lrk train method=idaicl`` fits once with all training examples and once for each share of the first
label; ``lrk evaluate run=…`` then answers the test split behind the same ``--draws`` sets of demonstrations with every
calibration. Beside these: no demonstrations (statistics only), orders, wordings, few examples for the statistics, and
the curves over λ and τ. Run folders go to ``--outputs``, and what is finished there is not repeated; the numbers, the
commands, the commit and the machine go to docs/results/idaicl.json, the box plots and the tables beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from lowrank_cli.report import plots
from lowrank_cli.runs import all_runs
from lowrank_cli.runs.provenance import cpu_name, git_state, package_versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
TASKS = ("tiny_sentiment", "tiny_yesno", "tiny_topic", "tiny_entailment")
CALIBRATIONS = ("none", "conca", "dconca", "proca", "ida")
SHARES = (0.1, 0.3, 0.5)
STRENGTHS, TAUS = "[0,0.1,0.25,0.5,0.75,1,2]", "[0,0.5,1,2]"


class Suite:
    """Calls ``lrk`` once for each combination, in a folder named by it."""

    def __init__(self, outputs: Path, common: list[str]):
        self.outputs, self.common = outputs.resolve(), common
        self.cells: list[dict[str, Any]] = []

    def run(self, verb: str, *overrides: str) -> Path:
        """The run folder of one command, made now or found finished; its command stands without folders."""
        shown = [item for item in overrides if not item.startswith("run=")]
        name = hashlib.sha256(" ".join([verb, *overrides, *self.common]).encode()).hexdigest()[:12]
        folder = self.outputs / name
        if not any(run.done for run in all_runs(folder)):
            arguments = [verb, *overrides, *self.common, f"outputs={folder}"]
            subprocess.run([sys.executable, "-m", "lowrank_cli", *arguments], check=True, cwd=ROOT)
        (run,) = [run for run in all_runs(folder) if run.done]
        self.command = f"lrk {verb} {' '.join([*shown, *self.common])}"
        return run.path

    def fit(self, task: str, *overrides: str) -> tuple[str, str]:
        """``run=`` of a fitted run, and the command that made it."""
        path = self.run("train", "method=idaicl", f"task={task}", *overrides)
        return f"run={path}", self.command

    def answer(self, part: str, task: str, fitted: tuple[str, str], calibration: str, *overrides: str) -> None:
        """Evaluate with one calibration and note what came out."""
        path = self.run("evaluate", fitted[0], f"method.calibration={calibration}", *overrides)
        rows = json.loads((path / "arrangements.json").read_text())
        values = [row["accuracy"] for row in rows]
        self.cells.append(
            {
                "part": part,
                "task": task,
                "calibration": calibration,
                "settings": list(overrides),
                "fitted": fitted[1],
                "command": self.command,
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "worst": min(values),
                "values": values,
                "figures": {
                    figure["file"].removesuffix(".png"): dict(zip(figure["rows"], figure["values"]))
                    | ({"over": figure["columns"]} if figure["kind"] == "lines" else {})
                    for figure in json.loads((path / "figures.json").read_text())
                    if figure["kind"] != "box"
                },
            }
        )


def measure(suite: Suite, task: str, shots: list[int], draws: int, templates: int) -> None:
    """Every part of one task."""
    usual = suite.fit(task)
    for m in shots:
        for calibration in CALIBRATIONS:
            suite.answer("balanced", task, usual, calibration, f"evaluate.shots={m}", f"method.draws={draws}")
    middle = f"evaluate.shots={shots[len(shots) // 2]}"
    for share in SHARES:
        skewed = suite.fit(task, "method.demonstrations=imbalanced", f"method.share={share}")
        for calibration in CALIBRATIONS:
            suite.answer(f"share {share}", task, skewed, calibration, middle, f"method.draws={draws}")
    wordings = suite.fit(task, f"method.templates={templates}")
    few = suite.fit(task, "method.examples=32")
    behind_prompt = suite.fit(task, "method.features=prompt")
    for calibration in ("none", "ida"):
        suite.answer("statistics only", task, usual, calibration, "evaluate.shots=0")
        suite.answer("one demonstration", task, usual, calibration, "evaluate.shots=1", f"method.draws={draws}")
        suite.answer("orders", task, usual, calibration, middle, f"method.permutations={draws}")
        suite.answer("wordings", task, wordings, calibration, middle, f"method.templates={templates}")
        for choice in ("similar", "dissimilar"):
            suite.answer(choice, task, usual, calibration, middle, f"method.demonstrations={choice}")
    suite.answer("32 examples", task, few, "ida", middle, f"method.draws={draws}")
    suite.answer("features behind the prompt", task, behind_prompt, "ida", middle, f"method.draws={draws}")
    curves = (f"method.strengths={STRENGTHS}", f"method.taus={TAUS}")
    suite.answer("curves", task, usual, "ida", middle, f"method.draws={draws}", *curves)


def tables(cells: list[dict[str, Any]]) -> str:
    """Markdown: one line for each task, part and setting, a column for each calibration."""
    lines = ["| task | demonstrations | " + " | ".join(CALIBRATIONS) + " |", "|---" * (2 + len(CALIBRATIONS)) + "|"]
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for cell in cells:
        m = next(item.partition("=")[2] for item in cell["settings"] if item.startswith("evaluate.shots"))
        groups.setdefault((cell["task"], f"{cell['part']}, m = {m}"), {})[cell["calibration"]] = cell
    for (task, part), found in groups.items():
        shown = [_cell(found[name]) if name in found else "" for name in CALIBRATIONS]
        lines.append(f"| {task} | {part} | {' | '.join(shown)} |")
    heading = "Accuracy in %: mean ± standard deviation over sets, orders or wordings (worst)."
    return "\n".join([heading, "", *lines, ""])


def _cell(cell: dict[str, Any]) -> str:
    if cell["std"] is None:
        return f"{100 * cell['mean']:.1f}"
    return f"{100 * cell['mean']:.1f} ± {100 * cell['std']:.1f} ({100 * cell['worst']:.1f})"


def boxes(cells: list[dict[str, Any]], task: str, shots: int) -> None:
    """One box for each calibration over the balanced sets of a task."""
    own = [c for c in cells if c["task"] == task and c["part"] == "balanced"]
    rows = [c for c in own if f"evaluate.shots={shots}" in c["settings"]]
    entry = {
        "title": f"{task}: test accuracy over {len(rows[0]['values'])} sets of {shots} demonstrations",
        "rows": [c["calibration"] for c in rows],
        "values": [c["values"] for c in rows],
        "label": "accuracy",
    }
    plots.box(entry).savefig(RESULTS / f"idaicl_{task}.png", dpi=plots.DPI)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--templates", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides of every command")
    args = parser.parse_args()
    suite = Suite(args.outputs, ["hardware.threads=1", *args.set])
    for task in args.tasks:
        measure(suite, task, args.shots, args.draws, args.templates)
    record = {
        "command": "python " + " ".join(["scripts/idaicl_evidence.py", *sys.argv[1:]]),
        "seeds": {"statistics": 0, "demonstrations": list(range(args.draws))},
        "commit": git_state(),
        "machine": cpu_name(),
        "packages": package_versions(),
        "cells": suite.cells,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "idaicl.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "idaicl.md").write_text(tables(suite.cells))
    for task in args.tasks:
        boxes(suite.cells, task, args.shots[len(args.shots) // 2])


if __name__ == "__main__":
    main()
