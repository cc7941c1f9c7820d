"""Run a suite of experiments: every method on every task over the same seeds, and compare them.

    python scripts/research/evidence.py scripts/research/suites/milora.yaml --outputs DIR [--groups bundled] \
        [--set data=DIR encoder=DIR]

A suite is a YAML file: ``methods`` (name: overrides), ``baseline``, ``seeds``, and ``groups`` of tasks that share
``overrides``; ``row`` names the baseline's row in ``lrk compare`` where that is another. A group adds to a method's
overrides by its own ``methods``. A task is a list of overrides, or has one for each method. Where a group has ``tune``,
each method first takes, from ``values`` of ``key``, the one with the best dev loss at seed 100 on each task, or for all
tasks on ``task`` where that is named; methods of one pool (``pools``) take what its first took. Where a group, or the
suite, has ``prepare`` (name: a verb and its overrides), these run before, the group's first, for every seed:
``{name}`` is the folder that one leaves, for later ones and for the methods, and ``{seed}`` the seed. A cell (task,
method) is one sweep of ``lrk train`` over the seeds; what is finished is kept, so the script can be stopped and called
again; a cell made with other overrides is refused. Results go to docs/results/<suite>/<group>/: the tables of
``lrk compare`` (Markdown and CSV, one line a method with its values by seed) and about.json (commands with the names of
``--set``, tuned values, commits of the runs, machine).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import yaml

from lowrank_cli.runs import all_runs
from lowrank_cli.runs.provenance import cpu_name, package_versions

ROOT = Path(__file__).resolve().parents[2]
TUNING_SEED = 100


def lrk(*arguments: str) -> None:
    """One call of the command line, from the repository; a failure ends the suite."""
    subprocess.run([sys.executable, "-m", "lowrank_cli", *arguments], check=True, cwd=ROOT)


def filled(overrides: list[str], variables: dict[str, str]) -> list[str]:
    """``overrides`` with the values of ``{names}`` in them."""
    return [text.format(**variables) for text in overrides]


def sweep(overrides: list[str], folder: Path) -> None:
    """Train every combination once, in ``folder``; an interrupted sweep goes on."""
    ledgers = sorted(folder.rglob("sweep.json"))
    if not ledgers:
        lrk("train", "-m", *overrides, f"outputs={folder}")
        return
    ledger = json.loads(ledgers[-1].read_text())
    made = [text for text in ledger["overrides"] if not text.startswith("outputs=")]
    if made != overrides:
        raise SystemExit(f"{folder} was made with {' '.join(made)}, now asked: {' '.join(overrides)}; move it away")
    if ledger["status"] != "done":
        lrk("train", "-m", "--resume", str(ledgers[-1].parent))


def prepare(steps: dict[str, list[str]], seed: str, variables: dict[str, str], folder: Path) -> list[str]:
    """Run what a group needs for one seed, as far as it is not done. Returns the commands."""
    commands = []
    for name, (verb, *overrides) in steps.items():
        own = folder / name / seed
        commands.append(" ".join(["lrk", verb, f"seed={seed}", *overrides]))
        if not any(run.done for run in all_runs(own)):
            values = variables | left(steps, seed, folder)
            lrk(verb, *filled([f"seed={seed}", *overrides], values), f"outputs={own}")
    return commands


def left(steps: dict[str, list[str]], seed: str, folder: Path) -> dict[str, str]:
    """The folders that :func:`prepare` leaves for a seed, and the seed, by their names in a suite."""
    return {"seed": seed} | {name: str(folder / name / seed / "latest") for name in steps}


def best(folder: Path, key: str) -> str:
    """The value of ``key`` whose run in ``folder`` has the lowest dev loss."""
    losses = {}
    for run in all_runs(folder):
        value = run.config()
        for part in key.split("."):
            value = value[part]
        losses[value] = run.metrics.get("dev/loss", math.inf)
    return str(min(losses, key=losses.__getitem__))


def run_group(suite: dict, name: str, variables: dict[str, str], outputs: Path) -> dict:
    """All cells of one group; returns commands and tuned values."""
    group, seeds = suite["groups"][name], ",".join(map(str, suite["seeds"]))
    steps, prepared = group.get("prepare", {}) | suite.get("prepare", {}), outputs / "prepared" / name
    commands: list[str] = []
    tuned: dict[str, dict[str, str]] = {}
    for seed in [*suite["seeds"], *[TUNING_SEED] * ("tune" in group)]:
        commands += prepare(steps, str(seed), variables, prepared)
    values = variables | left(steps, "${seed}", prepared)

    def cell(task: str, method: str, rest: list[str], folder: Path) -> None:
        own = group["tasks"][task]
        own = own[method] if isinstance(own, dict) else own
        settings = [*suite["methods"][method], *group.get("methods", {}).get(method, [])]
        overrides = [*group["overrides"], *own, *settings, *rest]
        commands.append(" ".join(["lrk train -m", *overrides]))
        sweep(filled(overrides, values), folder)

    def tuned_on(task: str, method: str) -> str:
        key, options = group["tune"]["key"], ",".join(map(str, group["tune"]["values"]))
        task = group["tune"].get("task", task)
        method = next((pool[0] for pool in suite.get("pools", {}).values() if method in pool), method)
        folder = outputs / "tuning" / name / task / method
        if method not in tuned.setdefault(task, {}):
            cell(task, method, [f"{key}={options}", f"seed={TUNING_SEED}"], folder)
            tuned[task][method] = f"{key}={best(folder, key)}"
        return tuned[task][method]

    for method in suite["methods"]:
        for task in group["tasks"]:
            chosen = [tuned_on(task, method)] if "tune" in group else []
            cell(task, method, [*chosen, f"seed={seeds}"], outputs / "runs" / name / task / method)
    return {"commands": commands, "tuned": tuned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--outputs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--groups", nargs="+", help="only these groups of the suite")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="values of {NAME} in the suite")
    args = parser.parse_args()
    suite = yaml.safe_load(args.suite.read_text())
    variables = dict(item.split("=", 1) for item in args.set)
    outputs = args.outputs.absolute()
    for name in args.groups or suite["groups"]:
        about = run_group(suite, name, variables, outputs)
        results = ROOT / "docs" / "results" / args.suite.stem / name
        tasks = [outputs / "runs" / name / task for task in suite["groups"][name]["tasks"]]
        lrk("compare", *map(str, tasks), "--baseline", suite.get("row", suite["baseline"]), "--output", str(results))
        runs = [run for task in tasks for method in suite["methods"] for run in all_runs(task / method)]
        commits = sorted({run.info["git"]["commit"] for run in runs})
        about |= {"commits": commits, "machine": cpu_name(), "packages": package_versions()}
        (results / "about.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
