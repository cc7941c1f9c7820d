"""One file of a run, sweep, recipe, checkpoint or adapter is changed; then a command reads it.

Whatever it holds, the command refuses it in one line and leaves everything as it was, or does what it does with the
file unchanged. A run beside it is listed and compared as ever.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import mutate
from .box import Box, outcome, same
from .samples import SMALL, Samples
from .trial import Failed

Reader = Callable[[Box, Path], list[str]]
PROMPT = "zorp is red. Is zorp red?"
SHORT = ("generate.max_new_tokens=4", "hardware.threads=1")


def _tenants(folder: str) -> Reader:
    """Answers two prompts in a batch: one with the changed adapter, one with the bare model."""

    def arguments(box: Box, run: Path) -> list[str]:
        rows = [{"tenant": str(run / folder), "prompt": PROMPT}, {"tenant": None, "prompt": PROMPT}]
        (box.work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["generate", "method=none", "--tenants", "prompts.jsonl", *SHORT]

    return arguments


#: What reads a sample: its commands by name.
READERS: dict[str, dict[str, Reader]] = {
    "trained_lora": {
        "evaluate": lambda box, run: ["evaluate", f"run={run}"],
        "dry run": lambda box, run: ["evaluate", f"run={run}", "--dry-run"],
        "generate": lambda box, run: ["generate", f"run={run}", PROMPT, *SHORT],
        "export": lambda box, run: ["export", f"run={run}"],
        "score": lambda box, run: ["score", f"run={run}", "score.batch=4", "score.kind=magnitude"],
        "train on": lambda box, run: ["train", f"run={run}", *SMALL[2:], "train.max_steps=2"],
        "tenants": _tenants("."),
        "list": lambda box, run: ["list", "runs"],
        "compare": lambda box, run: ["compare"],
    },
    "unfinished": {
        "resume": lambda box, run: ["train", "--resume", str(run)],
        "list": lambda box, run: ["list", "runs"],
    },
    "scored": {
        "prune": lambda box, run: ["prune", f"run={run}", "prune.drop=2"],
        "list": lambda box, run: ["list", "runs"],
        "compare": lambda box, run: ["compare"],
    },
    "exported": {
        "tenants": _tenants("export"),
        "list": lambda box, run: ["list", "runs"],
    },
    "sweep": {
        "resume": lambda box, run: ["train", "-m", "--resume", str(run)],
        "list": lambda box, run: ["list", "runs"],
        "compare": lambda box, run: ["compare", str(run)],
    },
    "recipe": {
        "resume": lambda box, run: ["run", "--resume", str(run)],
        "list": lambda box, run: ["list", "runs"],
    },
}
#: How often each sample is drawn.
SHARES = {"trained_lora": 8, "unfinished": 5, "scored": 2, "exported": 3, "sweep": 2, "recipe": 2}
SURVEYS = ("list", "compare")  #: readers of every run
SURVEYED = ("run.json", "config.yaml", "metrics.json", "recipe.json", "sweep.json")  #: what they read of each


def trial(seed: int, box: Box, samples: Samples) -> None:
    """One change of one file, read by one command."""
    chance = random.Random(seed)
    sample = chance.choices(list(SHARES), list(SHARES.values()))[0]
    name = chance.choice(list(READERS[sample]))
    expected = samples.once(f"{sample} {name}", lambda root: _read(root, sample, name, samples))
    run = samples.place(sample, box)
    path = _file(box.work / run, name, chance)
    change = mutate.change(path, chance, box.executed)
    consistent = chance.random() < 0.3 and mutate.rehash(path)
    box.case = f"{sample} {name}, {path.relative_to(box.work / run).parent / change}{', hashed anew' * consistent}"
    neighbour = samples.place("evaluated", box) if name in SURVEYS else None
    before = box.snapshot()
    names = () if consistent else _names(path, run, change)  # what a whole file holds can fail anywhere
    ended = box.run(*READERS[sample][name](box, run), names=names)
    if neighbour is not None:
        if ended.code != 0 and name == "list":
            raise Failed(f"one broken run and nothing is listed: {ended.err.strip()}")
        if ended.code == 0 and name == "list" and neighbour.name[:6] not in ended.out and "evaluate" not in ended.out:
            raise Failed("the run beside it is not listed")
        if ended.code == 0 and name == "compare" and sample != "sweep" and "accuracy" not in ended.out:
            raise Failed("the run beside it is not compared")
        _untouched(box, before, ())
    elif ended.code == 0 and not consistent:
        stays = path.suffix == ".jsonl" or (name == "resume" and _is_finished(path))
        log = f" {path.name}" if stays else "\0"  # as it was changed
        pair = [{k: v for k, v in of.items() if not k.endswith(log)} for of in (_result(box, run, name), expected)]
        same(pair[0], pair[1], "accepted, and computes something else")
    elif ended.code == 2:
        _untouched(box, before, (str(Path("work", run)) if name == "resume" else "work/prompts.jsonl",))


def _read(root: Path, sample: str, name: str, samples: Samples) -> dict[str, Any]:
    """What the command computes from the sample as it was made."""
    box = Box(root, samples.home)
    run = samples.place(sample, box)
    if name in SURVEYS:
        samples.place("evaluated", box)
    box.run(*READERS[sample][name](box, run), codes=(0,))
    return _result(box, run, name)


def _result(box: Box, run: Path, name: str) -> dict[str, Any]:
    """What the command computed: its answers, or the runs that it made or went on with."""
    if name in ("generate", "tenants", "dry run"):
        text = box.commands[-1].out
        return {"stdout": text.replace(str(box.root), "")}
    found = {}
    for file in sorted(box.work.glob("outputs/2*/**/run.json")):
        if name == "resume" or box.work / run not in file.parents:
            info = json.loads(file.read_text())
            for key, value in outcome(file.parent).items():
                found[f"{info['stage']} {info['seed']} {key}"] = value
    return found


def _file(run: Path, name: str, chance: random.Random) -> Path:
    """A file of the run that the command may read."""
    files = sorted(
        path
        for path in run.rglob("*")
        if path.is_file() and path.suffix in (".json", ".yaml", ".jsonl", ".safetensors") and "plots" not in path.parts
    )
    if name in SURVEYS:
        files = [path for path in files if path.name in SURVEYED]
    elif name == "resume" and chance.random() < 0.6:
        files = [path for path in files if "checkpoints" in path.parts or path.name in ("recipe.json", "sweep.json")]
    return chance.choice(files)


def _is_finished(path: Path) -> bool:
    """Whether a file is of a job or stage that is done, so that resuming the others does not write it again."""
    record = next((folder / "run.json" for folder in path.parents if (folder / "run.json").is_file()), path)
    return path != record and json.loads(record.read_text())["status"] == "done"


def _names(path: Path, run: Path, change: str) -> tuple[str, ...]:
    """What an error about the file may name: it, a folder that it is in, or the key that was changed."""
    keys = re.findall(r"[a-z]\w{2,}", change.partition(": ")[2])
    return (path.name, path.parent.name, run.name, *keys)


def _untouched(box: Box, before: dict[str, str], but: tuple[str, ...]) -> None:
    """Raise :class:`Failed` where a refused command left something new or changed."""
    after = box.snapshot()
    for name in sorted(before.keys() ^ after.keys() | {name for name in before if before[name] != after.get(name)}):
        if not name.startswith(but or ("\0",)):
            raise Failed(f"refused, but {'changed' if name in before else 'left'} {name.rpartition('/')[2]}")
