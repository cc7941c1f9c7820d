"""What a study's runs end with, by role and by layer: a figure of roles and layers that each of them drew.

    python scripts/research/allocation.py STUDY_FOLDER
    python scripts/research/allocation.py STUDY_FOLDER --figure preferred_width

Prints for each group and each arm whose runs have the figure, by task and over all tasks, the mean over seeds and
modules (a module without ranks counts 0). Writes it to allocation-GROUP.json, or FIGURE-GROUP.json, in the study's
folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from lowrank_cli.runs import Run

ROLES = list("QKVOGUD")


def drawn(folder: Path, figure: str) -> tuple[list[str], list[list[list[float]]]]:
    """The roles, and roles × layers of each finished run in ``folder`` that drew them."""
    figures = [entry for run in _finished(folder) for entry in json.loads(_figures(run.path))]
    found = [entry for entry in figures if entry["file"] == f"{figure}.png"]
    if not found:
        return [], []
    if found[0]["columns"][0] in ROLES:  # layers × roles
        return found[0]["columns"], [np.transpose(entry["values"]).tolist() for entry in found]
    return found[0]["rows"], [entry["values"] for entry in found]


def _finished(folder: Path) -> list[Run]:
    return [run for file in sorted(folder.glob("*/run.json")) if (run := Run.open(file.parent)).done]


def _figures(path: Path) -> str:
    file = path / "figures.json"
    return file.read_text() if file.is_file() else "[]"


def summary(roles: list[str], found: list[list[list[float]]]) -> dict:
    """Means of runs × roles × layers."""
    table = np.array(found)
    by_role = {role: round(float(mean), 2) for role, mean in zip(roles, table.mean((0, 2)), strict=True)}
    return {
        "runs": len(table),
        "without_ranks": round(float((table == 0).sum((1, 2)).mean()), 2),
        "roles": by_role,
        "layers": [round(float(mean), 2) for mean in table.mean((0, 1))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("--figure", default="ranks")
    args = parser.parse_args()
    study = Run.open(args.study).read_json("study.json")
    for group, group_tasks in study["groups"].items():
        record: dict[str, dict] = {}
        for arm in study["arms"]:
            everything: list[list[list[float]]] = []
            for task in group_tasks:
                roles, found = drawn(args.study / "runs" / group / task / arm, args.figure)
                if found:
                    record.setdefault(arm, {})[task] = summary(roles, found)
                    everything += found
            if everything:
                record[arm]["all"] = summary(roles, everything)
        for arm, tasks in record.items():
            for task, means in tasks.items():
                print(f"{group:8} {arm:18} {task:12}", *means["roles"].values(), "|", *means["layers"])
        if record:
            name = "allocation" if args.figure == "ranks" else args.figure
            (args.study / f"{name}-{group}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
