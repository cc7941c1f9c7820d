"""Calibrations over sets of demonstrations: mean ± standard deviation (worst) over all sets, in points.

    python scripts/research/idaicl_sets.py STUDY_FOLDER [--json FILE]

Reads the folder of ``lrk study study=idaicl`` or ``study=idaicl_bundled``, finished or not, and prints a Markdown table
for each group. All sets of all seeds count: they are disjoint within a seed and independent between seeds. Behind each
calibration stands how much of the possible gain it gets: its mean minus that of plain in-context learning, by what the
best constant offset of each set would gain, which is found with the test labels. Then IDAICL's mean over λ, with τ = 1,
and over τ, with λ = 0.5. ``lrk compare STUDY_FOLDER`` tests the differences.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lowrank_cli.report.run_results import own_metric
from lowrank_cli.report.study_results import read_study

BOUND = "oracle_each_set"
NAMES = {"oracle_all_sets": "bound: one offset", BOUND: "bound: an offset a set"}


def over_sets(folders: list[Path], metric: str) -> dict[str, list[float]]:
    """The metric of every set of demonstrations, by calibration; the runs' own is ``plain``."""
    rows = [row for folder in folders for row in json.loads((folder / "arrangements.json").read_text())]
    others = [key for key in rows[0] if key not in ("template", "draw", "permutation", "demonstrations", metric)]
    return {"plain": [row[metric] for row in rows], **{key: [row[key] for row in rows] for key in others}}


def table(group: str, tasks: dict[str, dict[str, list[float]]]) -> str:
    """A row for each calibration, a column for each task of the group."""
    calibrations = dict.fromkeys(name for values in tasks.values() for name in values)
    sets = {task: len(values["plain"]) for task, values in tasks.items()}
    lines = [f"| {group} | {' | '.join(f'{task} ({count} sets)' for task, count in sets.items())} |"]
    lines.append("|" + "---|" * (len(tasks) + 1))
    for name in sorted(calibrations, key=lambda name: name in NAMES):
        cells = [cell(values, name) for values in tasks.values()]
        lines.append(f"| {NAMES.get(name, name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(folders: list[Path]) -> dict[str, dict[str, float]]:
    """The mean metric of IDAICL over all sets at each value of λ (``strength``) and of τ (``tau``)."""
    found: dict[str, dict[str, list[float]]] = {}
    for folder in folders:
        for figure in json.loads((folder / "figures.json").read_text()):
            key = figure["file"].removesuffix(".png")
            if key in ("strength", "tau"):
                for value, of_value in zip(figure["columns"], figure["values"][0], strict=True):
                    found.setdefault(key, {}).setdefault(f"{value:g}", []).append(of_value)
    return {key: {value: mean(of_value) for value, of_value in by_value.items()} for key, by_value in found.items()}


def curve_table(group: str, key: str, tasks: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row for each value of λ or τ."""
    by_task = {task: of_task[key] for task, of_task in tasks.items() if key in of_task}
    lines = [f"| {group}, {key} | {' | '.join(by_task)} |", "|" + "---|" * (len(by_task) + 1)]
    for value in dict.fromkeys(value for by_value in by_task.values() for value in by_value):
        cells = " | ".join(f"{100 * by_value[value]:.1f}" for by_value in by_task.values())
        lines.append(f"| {value} | {cells} |")
    return "\n".join(lines)


def cell(values: dict[str, list[float]], name: str) -> str:
    """Mean ± standard deviation (worst), and the share of the possible gain."""
    own, plain = values[name], mean(values["plain"])
    spread = f" ± {100 * stdev(own):.1f}" if len(own) > 1 else ""
    text = f"{100 * mean(own):.1f}{spread} ({100 * min(own):.1f})"
    possible = mean(values[BOUND]) - plain
    return (
        text if name in ("plain", *NAMES) or possible <= 0 else f"{text} {100 * (mean(own) - plain) / possible:+.0f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("--json", type=Path, help="also write the values of every set there")
    args = parser.parse_args()
    study = read_study(args.study)
    groups: dict[str, dict[str, dict[str, list[float]]]] = {}
    over: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for (group, task), arms in study.results.items():
        results = list(arms.get(study.record["baseline"], {}).values())
        if results:
            metric, folders = own_metric(results).removeprefix("test/"), [result.path for result in results]
            groups.setdefault(group, {})[task] = over_sets(folders, metric)
            over.setdefault(group, {})[task] = curves(folders)
    tables = [table(group, tasks) for group, tasks in groups.items()]
    tables += [curve_table(group, key, tasks) for group, tasks in over.items() for key in ("strength", "tau")]
    print("\n\n".join(tables))
    if args.json:
        record: dict[str, Any] = {"study": study.record["name"], "seeds": study.record["seeds"]}
        record |= {"sets": groups, "idaicl_over": over}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
