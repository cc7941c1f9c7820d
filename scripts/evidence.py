"""Run a suite of experiments: every method on every task over the same seeds, and compare them.

    python scripts/evidence.py scripts/suites/milora.yaml --outputs DIR [--groups bundled] [--set data=DIR encoder=DIR]

A suite is a YAML file: ``methods`` (name: overrides), ``baseline``, ``seeds``, and ``groups`` of tasks that share
``overrides``. Where a group has ``tune``, each method first takes, from ``values`` of ``key``, the one with the best
dev loss at seed 100 on the ``task``. Where a group, or the suite, has ``prepare`` (name: a verb and its overrides),
these run before, the group's first, for every seed: ``{name}`` is the folder that one leaves, for later ones and for
the methods, and ``{seed}`` the seed. A cell (task, method) is one sweep of ``lrk train`` over the seeds; what is
finished is kept, so the script can be stopped and called again. Results go to docs/results/<suite>/: the tables of
``lrk compare`` (Markdown and CSV, one line a method with its values by seed) and about.json (commands, tuned values,
commit, machine).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import yaml

from lowrank_cli.runs.provenance import cpu_name, git_state, package_versions

ROOT = Path(__file__).resolve().parents[1]
TUNING_SEED = 100


def lrk(*arguments: str) -> None:
    """One call of the command line, from the repository; a failure ends the suite."""
    subprocess.run([sys.executable, "-m", "lowrank_cli", *arguments], check=True, cwd=ROOT)


def sweep(overrides: list[str], folder: Path) -> str:
    """Train every combination once, in ``folder``; an interrupted sweep goes on. Returns the command."""
    arguments = ["train", "-m", *overrides]
    ledgers = sorted(folder.rglob("sweep.json"))
    if not ledgers:
        lrk(*arguments, f"outputs={folder}")
    elif json.loads(ledgers[-1].read_text())["status"] != "done":
        lrk("train", "-m", "--resume", str(ledgers[-1].parent))
    return "lrk " + " ".join(arguments)


def prepare(steps: dict[str, list[str]], seed: str, variables: dict[str, str], folder: Path) -> list[str]:
    """Run what a group needs for one seed, as far as it is not done. Returns the commands."""
    commands = []
    for name, (verb, *overrides) in steps.items():
        own = folder / name / seed
        filled = [text.format(**variables, **left(steps, seed, folder)) for text in (f"seed={seed}", *overrides)]
        commands.append("lrk " + " ".join([verb, *filled]))
        done = [file for file in own.glob("*/*/run.json") if json.loads(file.read_text())["status"] == "done"]
        if not done:
            lrk(verb, *filled, f"outputs={own}")
    return commands


def left(steps: dict[str, list[str]], seed: str, folder: Path) -> dict[str, str]:
    """The folders that :func:`prepare` leaves for a seed, and the seed, by their names in a suite."""
    return {"seed": seed} | {name: str(folder / name / seed / "latest") for name in steps}


def best(folder: Path, key: str) -> str:
    """The value of ``key`` whose run in ``folder`` has the lowest dev loss."""
    losses = {}
    for file in folder.rglob("metrics.json"):
        if "latest" in file.parts:
            continue
        config = yaml.safe_load((file.parent / "config.yaml").read_text())
        for part in key.split("."):
            config = config[part]
        losses[config] = json.loads(file.read_text()).get("dev/loss", math.inf)
    return str(min(losses, key=losses.__getitem__))


def run_group(suite: dict, name: str, variables: dict[str, str], outputs: Path) -> dict:
    """All cells of one group; returns commands and tuned values."""
    group, seeds = suite["groups"][name], ",".join(map(str, suite["seeds"]))
    common = [text.format(**variables) for text in group["overrides"]]
    about: dict = {"commands": [], "tuned": {}}
    steps, prepared = group.get("prepare", {}) | suite.get("prepare", {}), outputs / "prepared" / name
    for seed in [*suite["seeds"], *[TUNING_SEED] * ("tune" in group)]:
        about["commands"] += prepare(steps, str(seed), variables, prepared)
    of_its_seed = left(steps, "${seed}", prepared)
    for method, overrides in suite["methods"].items():
        settings = [text.format(**variables, **of_its_seed) for text in overrides]
        chosen = []
        if tune := group.get("tune"):
            folder = outputs / "tuning" / name / method
            values = ",".join(map(str, tune["values"]))
            task = [text.format(**variables) for text in group["tasks"][tune["task"]]]
            command = sweep([*common, *task, *settings, f"{tune['key']}={values}", f"seed={TUNING_SEED}"], folder)
            chosen = [f"{tune['key']}={best(folder, tune['key'])}"]
            about["commands"].append(command)
            about["tuned"][method] = chosen[0]
        for task, overrides in group["tasks"].items():
            special = [text.format(**variables) for text in overrides]
            cell = [*common, *special, *settings, *chosen, f"seed={seeds}"]
            about["commands"].append(sweep(cell, outputs / "runs" / name / task / method))
    return about


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
        runs = [str(path) for path in sorted((outputs / "runs" / name).iterdir())]
        lrk("compare", *runs, "--baseline", suite["baseline"], "--output", str(results))
        about |= {"machine": cpu_name(), "git": git_state(), "packages": package_versions()}
        (results / "about.json").write_text(json.dumps(about, indent=1).replace(f"{outputs}/", "") + "\n")


if __name__ == "__main__":
    main()
