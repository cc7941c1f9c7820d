"""IDAICL against plain in-context learning and three calibrations on the bundled model, over many demonstration sets.

    python scripts/research/idaicl_evidence.py --outputs DIR [--tasks tiny_sentiment …] [--draws 10] [--set KEY=VALUE …]

For each task ``lrk train method=idaicl`` fits once with all training examples and once for each share of the first
label; ``lrk evaluate run=…`` then answers the test split behind the same ``--draws`` sets of demonstrations with every
calibration. Beside these: no, one and sixteen demonstrations, orders, all wordings of the task, demonstrations chosen
for each query, few examples for the statistics, features behind the prompt, and the curves over λ (on both fits) and τ
(where the labels are skewed: with even shares it moves no answer). Run folders go to ``--outputs``, and what is
finished there is not repeated. The numbers, the commands, the commit and the machine go to
docs/results/idaicl.json, tables and figures beside it.

Four tasks are some 190 commands in one process: expect about an hour of one CPU core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from lowrank_cli.calibration import statistics_files
from lowrank_cli.config import compose
from lowrank_cli.launch import single_run
from lowrank_cli.report import plots
from lowrank_cli.report.statistics import sign_flip_test
from lowrank_cli.runs import all_runs
from lowrank_cli.runs.provenance import cpu_name, git_state, package_versions

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
TASKS = ("tiny_sentiment", "tiny_yesno", "tiny_topic", "tiny_entailment")
CALIBRATIONS = ("none", "conca", "dconca", "proca", "ida")
SHOTS, MIDDLE = (4, 8, 12), 8  #: with every calibration; of the parts that vary something else
FEW_OR_MANY = (0, 1, 16)  #: plain and ida only
SHARES = (0.125, 0.25)  #: of the first label: one and two of eight
STRENGTHS, TAUS = "method.strengths=[0,0.1,0.25,0.5,0.75,1,2]", "method.taus=[0,0.5,1,2]"


class Suite:
    """Calls ``lrk`` once for each combination, in a folder named by it."""

    def __init__(self, outputs: Path, common: list[str]):
        self.outputs, self.common = outputs.resolve(), common
        self.cells: list[dict[str, Any]] = []

    def run(self, verb: str, *overrides: str) -> tuple[Path, str]:
        """The run folder of one command, made now or found finished, and the command without folders."""
        shown = [item for item in overrides if not item.startswith("run=")]
        command = f"lrk {verb} {' '.join([*shown, *self.common])}"
        name = hashlib.sha256(" ".join([verb, *overrides, *self.common]).encode()).hexdigest()[:12]
        folder = self.outputs / name
        if not any(run.done for run in all_runs(folder)):
            single_run.start(verb, [*overrides, *self.common, f"outputs={folder}"], None, command)
        (run,) = [run for run in all_runs(folder) if run.done]
        return run.path, command

    def fit(self, task: str, *overrides: str) -> tuple[str, str]:
        """``run=`` of a fitted run, and the command that made it."""
        path, command = self.run("train", "method=idaicl", f"task={task}", *overrides)
        return f"run={path}", command

    def answer(self, part: str, task: str, fitted: tuple[str, str], calibration: str, *overrides: str) -> Path:
        """Evaluate with one calibration, note what came out; the run folder."""
        path, command = self.run("evaluate", fitted[0], f"method.calibration={calibration}", *overrides)
        rows = json.loads((path / "arrangements.json").read_text())
        values = [row["accuracy"] for row in rows]
        shares = statistics_files.load(Path(fitted[0].removeprefix("run=")) / "statistics")[0]["0.shares"]
        self.cells.append(
            {
                "part": part,
                "task": task,
                "calibration": calibration,
                "settings": list(overrides),
                "fitted": fitted[1],
                "command": command,
                "shares": [round(share, 4) for share in shares.tolist()],
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "worst": min(values),
                "values": values,
                "figures": {
                    figure["file"].removesuffix(".png"): figure
                    for figure in json.loads((path / "figures.json").read_text())
                    if figure["kind"] != "box"
                },
            }
        )
        return path


def measure(suite: Suite, task: str, draws: int) -> list[dict[str, Any]]:
    """Every part of one task; rows of margin against offset."""
    sets, middle = f"method.draws={draws}", f"evaluate.shots={MIDDLE}"
    usual, margins = suite.fit(task), []
    for m in SHOTS:
        paths = {}
        for calibration in CALIBRATIONS:
            curve = [STRENGTHS] if calibration == "ida" and m == MIDDLE else []
            paths[calibration] = suite.answer("random", task, usual, calibration, f"evaluate.shots={m}", sets, *curve)
        if m == MIDDLE:
            margins.append({"task": task, "demonstrations": "random", **margin(paths["none"], paths["ida"])})
    for share in SHARES:
        skew = ("method.demonstrations=imbalanced", f"method.share={share}")
        skewed, paths = suite.fit(task, *skew), {}
        for calibration in CALIBRATIONS:
            curves = [STRENGTHS, TAUS] if calibration == "ida" and share == SHARES[0] else []
            paths[calibration] = suite.answer(f"share {share}", task, skewed, calibration, middle, sets, *curves)
        margins.append({"task": task, "demonstrations": f"share {share}", **margin(paths["none"], paths["ida"])})
        if share == SHARES[0]:
            behind_prompt = suite.fit(task, *skew, "method.features=prompt")
            suite.answer(f"share {share}, features behind the prompt", task, behind_prompt, "ida", middle, sets)
    count = 1 + len(compose("train", ["method=idaicl", f"task={task}"]).config.task.templates)
    wordings = suite.fit(task, f"method.templates={count}")
    for calibration in ("none", "ida"):
        for m in FEW_OR_MANY:
            suite.answer("random", task, usual, calibration, f"evaluate.shots={m}", sets)
        suite.answer(f"{draws} orders", task, usual, calibration, middle, f"method.permutations={draws}")
        suite.answer(f"{count} wordings", task, wordings, calibration, middle)
        for choice in ("similar", "dissimilar"):
            suite.answer(choice, task, usual, calibration, middle, f"method.demonstrations={choice}")
    suite.answer("statistics of 32", task, suite.fit(task, "method.examples=32"), "ida", middle, sets)
    behind_prompt = suite.fit(task, "method.features=prompt")
    suite.answer("features behind the prompt", task, behind_prompt, "ida", middle, sets)
    return margins


def margin(plain: Path, ida: Path) -> dict[str, float]:
    """In nats, over the queries of the first set: plain scoring's margin, and what ida adds between the same answers.

    ``flipped`` is the share of queries whose answer ida changes.
    """
    margins, offsets, flipped = [], [], []
    for before, after in zip(*(_predictions(path) for path in (plain, ida)), strict=True):
        scores = before["scores"]
        best, second = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:2]
        margins.append(scores[best] - scores[second])
        offsets.append(after["scores"][best] - after["scores"][second] - margins[-1])
        flipped.append(before["choice"] != after["choice"])
    return {
        "margin": statistics.median(margins),
        "offset": statistics.median(map(abs, offsets)),
        "flipped": statistics.mean(flipped),
    }


def _predictions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]


def tables(cells: list[dict[str, Any]], margins: list[dict[str, Any]]) -> str:
    """Markdown: accuracy by calibration, margins, curves, and confusion where the labels are skewed."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for cell in cells:
        m = next(item.partition("=")[2] for item in cell["settings"] if item.startswith("evaluate.shots"))
        groups.setdefault((cell["task"], f"{cell['part']}, m = {m}", str(cell["shares"][0])), {})[
            cell["calibration"]
        ] = cell
    rows = [
        [*key, *(_cell(found.get(name)) for name in CALIBRATIONS), *_against_plain(found)]
        for key, found in groups.items()
    ]
    head = ["task", "demonstrations", "share of the first label in D", *CALIBRATIONS, "ida − none", "p"]
    lines = [
        "Accuracy in %: mean ± standard deviation over sets, orders or wordings (worst); at the end the mean",
        "difference in points over the same sets, orders or wordings, with its sign-flip test.",
        "",
        *_table(head, rows),
    ]
    rows = [
        [
            row["task"],
            row["demonstrations"],
            *(f"{row[key]:.2f}" for key in ("margin", "offset")),
            f"{row['flipped']:.1%}",
        ]
        for row in margins
    ]
    head = ["task", "demonstrations", "plain margin", "what ida adds to it", "answers changed"]
    lines += ["", f"Median nats between the two best answers, m = {MIDDLE}, first set.", "", *_table(head, rows)]
    for name, symbol in (("strength", "λ"), ("tau", "τ")):
        drawn = [cell for cell in cells if name in cell["figures"]]
        over = drawn[0]["figures"][name]["columns"]
        rows = [
            [cell["task"], cell["part"], *(_mean_and_worst(point) for point in zip(*cell["figures"][name]["values"]))]
            for cell in drawn
        ]
        head = ["task", "demonstrations", *(f"{symbol} = {value:g}" for value in over)]
        lines += ["", f"Accuracy in % over {symbol}, m = {MIDDLE}: mean (worst).", "", *_table(head, rows)]
    lines += ["", f"Answers in % to queries of each label, share {SHARES[0]}, m = {MIDDLE}, all sets."]
    for cell in cells:
        if cell["part"] == f"share {SHARES[0]}" and cell["calibration"] in ("none", "ida"):
            figure = cell["figures"]["confusion"]
            rows = [
                [word, *(f"{100 * value:.1f}" for value in row)] for word, row in zip(figure["rows"], figure["values"])
            ]
            title = f"{cell['task']}, {cell['calibration']}: label \\ answer"
            lines += ["", *_table([title, *figure["columns"]], rows)]
    return "\n".join([*lines, ""])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["std"] is None:
        return f"{100 * cell['mean']:.1f}"
    return f"{100 * cell['mean']:.1f} ± {100 * cell['std']:.1f} ({100 * cell['worst']:.1f})"


def _against_plain(found: dict[str, dict[str, Any]]) -> list[str]:
    if "none" not in found or "ida" not in found:
        return ["", ""]
    pairs = zip(found["ida"]["values"], found["none"]["values"], strict=True)
    differences = [ida - plain for ida, plain in pairs]
    p = sign_flip_test(differences) if len(differences) > 1 else None
    return [f"{100 * statistics.mean(differences):+.1f}", "" if p is None else f"{p:.3f}"]


def _mean_and_worst(point: tuple[float, ...]) -> str:
    mean, *worst = (f"{100 * value:.1f}" for value in point)
    return f"{mean} ({worst[0]})" if worst else mean


def draw(cells: list[dict[str, Any]], tasks: list[str], folder: Path) -> None:
    """A box for each calibration over the random sets of each task; the curves of all tasks in one picture each."""
    for task in tasks:
        rows = [
            cell
            for cell in cells
            if (cell["task"], cell["part"]) == (task, "random") and f"evaluate.shots={MIDDLE}" in cell["settings"]
        ]
        entry = {
            "title": f"{task}: test accuracy over {len(rows[0]['values'])} sets of {MIDDLE} demonstrations",
            "rows": [cell["calibration"] for cell in rows],
            "values": [cell["values"] for cell in rows],
            "label": "accuracy",
        }
        plots.write(plots.box(entry), folder / f"idaicl_{task}.png")
    for name in ("strength", "tau"):
        for part in sorted({cell["part"] for cell in cells if name in cell["figures"]}):
            drawn = [cell for cell in cells if cell["part"] == part and name in cell["figures"]]
            entry = drawn[0]["figures"][name] | {
                "title": f"mean test accuracy over {name}, demonstrations: {part}",
                "rows": [cell["task"] for cell in drawn],
                "values": [cell["figures"][name]["values"][0] for cell in drawn],
            }
            plots.write(plots.lines(entry), folder / f"idaicl_{name}_{part.replace(' ', '_')}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides of every command")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of numbers, tables and figures")
    args = parser.parse_args()
    suite, margins = Suite(args.outputs, ["hardware.threads=1", *args.set]), []
    for task in args.tasks:
        margins += measure(suite, task, args.draws)
    record = {
        "command": "python scripts/research/idaicl_evidence.py --outputs DIR",
        "tasks": args.tasks,
        "draws": args.draws,
        "set": args.set,
        "seeds": {"statistics": 0, "demonstrations": list(range(args.draws))},
        "commit": git_state(),
        "machine": cpu_name(),
        "packages": package_versions(),
        "margins": margins,
        "cells": suite.cells,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "idaicl.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.results / "idaicl_tables.md").write_text(tables(suite.cells, margins))
    draw(suite.cells, args.tasks, args.results)


if __name__ == "__main__":
    main()
