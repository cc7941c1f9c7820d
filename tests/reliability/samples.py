"""Runs that trials start from, each made once per campaign and copied into the trial's box."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .box import Box
from .trial import Failed

#: A few steps of the bundled model, a checkpoint after each.
QUICK = (
    "task=tiny_sentiment",
    "task.limit=12",
    "hardware.threads=1",
    "train.max_steps=6",
    "train.batch_size=4",
    "train.log_every=1",
    "train.eval_every=2",
    "train.checkpoint_every=1",
)
#: What makes a method's own work as small as that.
OWN = {"alora": ("method.rank=2", "method.dev_batch=4", "method.rounds=2")}
SMALL = ("method=lora", "method.rank=2", *QUICK)
ATTEMPTS = 10
UNFINISHED = 4  #: the step after which the unfinished sample was killed


class Samples:
    """Finished and unfinished runs by name, below ``folder``; ``home`` holds the caches of all commands."""

    def __init__(self, folder: Path, home: Path):
        self.folder, self.home = folder, home
        self._kept: dict[str, dict[str, Any]] = {}

    def place(self, name: str, box: Box) -> Path:
        """Copy a sample into the box's outputs; its folder there, relative to the working directory."""
        source = self.get(name)
        target = Path("outputs", source.parent.name, source.name)
        shutil.copytree(source, box.work / target, symlinks=True)
        return target

    def get(self, name: str) -> Path:
        """The folder of a sample, made now where it is not there yet."""
        root = self.folder / name
        if not (root / "ready").is_file():
            shutil.rmtree(root, ignore_errors=True)
            box = Box(root, self.home)
            getattr(self, f"_{name}")(box)
            (root / "ready").touch()
        return max(path for path in (root / "work" / "outputs").glob("2*/*") if path.is_dir())

    def once(self, name: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` finds in a folder of its own, kept for later trials."""
        if name not in self._kept:
            root = self.folder / f"kept-{len(self._kept)}"
            shutil.rmtree(root, ignore_errors=True)
            self._kept[name] = make(root)
        return self._kept[name]

    def method(self, name: str) -> Path:
        """An uninterrupted run of a method."""
        return self._trained(f"whole_{name}", training(name))

    def seconds(self, name: str) -> float:
        """How long that took, from the start of the command to its end."""
        self.method(name)
        return float((self.folder / f"whole_{name}" / "seconds").read_text())

    def _trained(self, name: str, overrides: Sequence[str]) -> Path:
        def make(box: Box) -> None:
            (box.root / "seconds").write_text(str(_done(box, "train", *overrides)))

        setattr(self, f"_{name}", make)
        return self.get(name)

    def _trained_lora(self, box: Box) -> None:
        _done(box, "train", *SMALL)

    def _unfinished(self, box: Box) -> None:
        """A run that was killed after a checkpoint; on a busy machine it may end before it is seen, and starts anew."""
        for _ in range(ATTEMPTS):
            shutil.rmtree(box.work / "outputs", ignore_errors=True)
            command = box.start("train", *SMALL)
            while command.running():
                if list(box.work.glob(f"outputs/2*/*/checkpoints/step-*{UNFINISHED}")):
                    command.kill()
                    command.wait(5)
                    return
                time.sleep(0.002)
        raise Failed(f"the sample 'unfinished' was not to be had: {command.wait(0).err}")

    def _scored(self, box: Box) -> None:
        run = self.place("trained_lora", box)
        _done(box, "score", f"run={run}", "score.batch=4", "score.kind=magnitude")

    def _evaluated(self, box: Box) -> None:
        run = self.place("trained_lora", box)
        _done(box, "evaluate", f"run={run}")

    def _exported(self, box: Box) -> None:
        run = self.place("trained_lora", box)
        _done(box, "export", f"run={run}")

    def _sweep(self, box: Box) -> None:
        """Two jobs, one of which is still to be run."""
        _done(box, "train", "-m", "seed=0,1", *SMALL)
        (ledger,) = box.work.glob("outputs/2*/*/sweep.json")
        values = json.loads(ledger.read_text())
        shutil.rmtree(ledger.parent / values["jobs"][1]["id"] / "checkpoints", ignore_errors=True)
        _pend(ledger.parent / values["jobs"][1]["id"])
        values["jobs"][1]["status"], values["status"] = "pending", "interrupted"
        ledger.write_text(json.dumps(values, indent=2) + "\n")

    def _recipe(self, box: Box) -> None:
        """Two stages, of which the second is still to be run."""
        folder = box.work / "conf" / "recipe"
        folder.mkdir(parents=True)
        (folder / "two.yaml").write_text(
            "defaults: [_recipe]\nname: two\nstages:\n"
            f"  - {{name: train, stage: train, overrides: {json.dumps(list(SMALL))}}}\n"
            '  - {name: test, stage: evaluate, overrides: ["run={train}"]}\n'
        )
        _done(box, "run", "recipe=two", "--config-dir", "conf")
        (ledger,) = box.work.glob("outputs/2*/*/recipe.json")
        values = json.loads(ledger.read_text())
        shutil.rmtree(ledger.parent / values["stages"][1]["folder"])
        values["stages"][1]["status"] = "pending"
        ledger.write_text(json.dumps(values, indent=2) + "\n")
        info = json.loads((ledger.parent / "run.json").read_text())
        info["status"] = "interrupted"
        (ledger.parent / "run.json").write_text(json.dumps(info, indent=2) + "\n")


def training(method: str) -> tuple[str, ...]:
    """The overrides of a small training of ``method``."""
    return (f"method={method}", *OWN.get(method, ()), *QUICK)


def _pend(run: Path) -> None:
    """Put a finished run back to where it was prepared."""
    info = json.loads((run / "run.json").read_text())
    info["status"] = "pending"
    (run / "run.json").write_text(json.dumps(info, indent=2) + "\n")
    for path in run.iterdir():
        if path.name not in ("run.json", "config.yaml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _done(box: Box, *arguments: str) -> float:
    """Run a command to its end; how long it took."""
    ended = box.start(*arguments).wait(300)
    if ended.code != 0:
        raise Failed(f"a sample was not to be had: lrk {' '.join(arguments)}: {ended.err[-1500:]} {ended.reports}")
    return ended.seconds
