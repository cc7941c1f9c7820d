"""Calibrations over sets of demonstrations: mean ± standard deviation (worst) over all sets, in points.

    python scripts/research/idaicl_sets.py STUDY_FOLDER [--json FILE]

Reads the folder of ``lrk study study=idaicl`` or ``study=idaicl_bundled``, finished or not, and prints a Markdown table
for each group. All sets of all seeds count: they are disjoint within a seed and independent between seeds. Behind each
calibration stands how much of the possible gain it gets: its mean minus that of plain in-context learning, by what the
best constant offset of each set would gain, which is found with the test labels. ``lrk compare STUDY_FOLDER`` tests the
differences.
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
    for (group, task), arms in study.results.items():
        results = list(arms.get(study.record["baseline"], {}).values())
        if results:
            metric = own_metric(results).removeprefix("test/")
            groups.setdefault(group, {})[task] = over_sets([result.path for result in results], metric)
    print("\n\n".join(table(group, tasks) for group, tasks in groups.items()))
    if args.json:
        record: dict[str, Any] = {"study": study.record["name"], "seeds": study.record["seeds"], "groups": groups}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
