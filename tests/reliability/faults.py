"""Disks that are full or read-only, files that are unreadable, terminals that are gone, directories that vanish."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .box import Box, outcome, same
from .kills import newest
from .samples import SMALL, Samples
from .trial import Failed, Skipped

NOBODY = 65534


def trial(seed: int, box: Box, samples: Samples) -> None:
    """The faults take turns; the seed draws how large and to which command."""
    fault = FAULTS[seed % len(FAULTS)]
    box.case = (fault.__doc__ or "").split("\n")[0].rstrip(".")
    fault(random.Random(seed), box, samples)


def largest_file(chance: random.Random, box: Box, samples: Samples) -> None:
    """No file may grow beyond a size, then a training goes on without the limit."""
    size = int(10 ** chance.uniform(4.3, 6.0))  # what the terminal gets is a file too, and has to fit
    box.case += f", {size} bytes"
    ended = box.run("train", *SMALL, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    _goes_on(box, samples, ended.code)


def full_disk(chance: random.Random, box: Box, samples: Samples) -> None:
    """A disk runs full, then a training goes on with more space."""
    size = int(10 ** chance.uniform(1.0, 3.5))
    box.case += f", {size} KiB"
    with _disk(box.work / "outputs", size) as enlarge:
        ended = box.run("train", *SMALL)
        enlarge()
        _goes_on(box, samples, ended.code)


def full_disk_of_a_reader(chance: random.Random, box: Box, samples: Samples) -> None:
    """A disk is full when a trained run is read."""
    run = samples.get("trained_lora")
    verb = chance.choice(("evaluate", "score", "export", "generate", "list", "compare"))
    box.case += f", {verb}"
    with _disk(box.work / "outputs", 64):
        (box.work / "outputs" / "filler").write_bytes(b"")
        with suppress(OSError), (box.work / "outputs" / "filler").open("wb") as file:
            while True:
                file.write(b"\0" * 512)
        box.run(*_reading(verb, run))


def read_only_disk(chance: random.Random, box: Box, samples: Samples) -> None:
    """A disk is read-only."""
    verb = chance.choice(("train", "evaluate", "score", "export", "list", "compare"))
    box.case += f", {verb}"
    with _disk(box.work / "outputs", 4096, read_only=True):
        box.run(
            *(("train", *SMALL) if verb == "train" else _reading(verb, samples.get("trained_lora"))), codes=(0, 1, 2)
        )


def unreadable_file(chance: random.Random, box: Box, samples: Samples) -> None:
    """Another user's run, of which one file or folder may not be read."""
    run = samples.place("trained_lora", box)
    _belong_to_nobody(box)
    paths = [path for path in (box.work / run).rglob("*") if path.suffix != ".png" and "plots" not in path.parts]
    path, verb = chance.choice(sorted(paths)), chance.choice(("evaluate", "export", "list", "compare", "train on"))
    box.case += f", {verb}, {path.relative_to(box.work / run)}"
    path.chmod(0)
    try:
        box.run(*_reading(verb, run), prepare=_as_nobody)
    finally:
        path.chmod(0o700)


def unwritable_outputs(chance: random.Random, box: Box, samples: Samples) -> None:
    """A folder of runs into which the user may not write."""
    run = samples.place("trained_lora", box)
    _belong_to_nobody(box)
    place = chance.choice((box.work / "outputs", (box.work / run).parent, box.work / run))
    verb = chance.choice(("train", "evaluate", "export", "list", "compare"))
    box.case += f", {verb}, {place.relative_to(box.work)}"
    place.chmod(0o500)
    box.run(*(("train", *SMALL) if verb == "train" else _reading(verb, run)), prepare=_as_nobody)


def no_terminal(chance: random.Random, box: Box, samples: Samples) -> None:
    """Standard output is full, closed, or a pipe that nobody reads."""
    run = samples.place("trained_lora", box)
    verb = chance.choice(("evaluate", "generate", "export", "list", "compare", "dry run", "check", "help"))
    kind = chance.choice(("full", "pipe", "closed"))
    box.case += f": {kind}, {verb}"

    def prepare() -> None:
        if kind == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        elif kind == "pipe":
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, 1)
        else:
            import sys

            os.close(1)
            sys.stdout = None  # type: ignore[assignment] (as the interpreter starts without one)

    ended = box.start(*_reading(verb, run), prepare=prepare).wait(60)
    if kind == "closed" and ended.code == 0:
        return
    if kind == "pipe" and ended.code in (0, 1, 120, 141, -13) and "Traceback" not in ended.err:
        return  # what head and others leave behind is no error
    box.judged(ended, codes=(0, 1, 2))


def vanished_directory(chance: random.Random, box: Box, samples: Samples) -> None:
    """The working directory was deleted."""
    gone = box.work / "gone"
    gone.mkdir()
    verb = chance.choice(("train", "dry run", "list", "compare", "check", "help", "generate"))
    box.case += f", {verb}"
    words = ("train", *SMALL) if verb == "train" else _reading(verb, Path("run"))
    ended = box.start(*words, cwd=gone, prepare=lambda: shutil.rmtree(gone)).wait(60)
    box.judged(ended)


def leftovers(chance: random.Random, box: Box, samples: Samples) -> None:
    """What killed writes left behind is gone after the run has gone on."""
    run = samples.place("unfinished", box)
    name = chance.choice(
        (
            "checkpoints/.step-0000003-ab12cd_9",
            "checkpoints/.step-0000003-ab12cd_9.old",
            ".adapter-x9y8z7w6",
            ".run.json-k3k3k3k3",
        )
    )
    left = box.work / run / name
    box.case += f": {name}"
    if name.startswith(".run.json"):
        left.write_text("{")
    else:
        left.mkdir()
        (left / "trained.safetensors").write_bytes(b"half")
    box.run("train", "--resume", str(run), codes=(0,))
    same(outcome(box.work / run), outcome(samples.get("trained_lora")), "continued")
    if left.exists():
        raise Failed(f"{name[:18]}… is still there")


FAULTS: list[Callable[[random.Random, Box, Samples], None]] = [
    largest_file,
    full_disk,
    full_disk_of_a_reader,
    read_only_disk,
    unreadable_file,
    unwritable_outputs,
    no_terminal,
    vanished_directory,
    leftovers,
]


def _reading(verb: str, run: Path) -> tuple[str, ...]:
    return {
        "list": ("list", "runs"),
        "compare": ("compare",),
        "help": ("train", "--help"),
        "check": ("check", "train"),
        "dry run": ("train", "--dry-run"),
        "generate": ("generate", f"run={run}", "zorp is red.", "generate.max_new_tokens=4", "hardware.threads=1"),
        "score": ("score", f"run={run}", "score.batch=4", "score.kind=magnitude"),
        "train on": ("train", f"run={run}", "train.max_steps=2"),
    }.get(verb, (verb, f"run={run}"))


def _goes_on(box: Box, samples: Samples, code: int | None) -> None:
    """After the fault the run is continued, or started where none was begun, and computes what it should."""
    run = newest(box)
    box.run("list", "runs", codes=(0,))
    if code != 0:
        box.run("train", *(SMALL if run is None else ("--resume", str(run.relative_to(box.work)))), codes=(0,))
    run = newest(box)
    assert run is not None
    same(outcome(run), outcome(samples.get("trained_lora")), "continued")


@contextmanager
def _disk(place: Path, kib: int, read_only: bool = False) -> Iterator[Callable[[], None]]:
    """A file system in memory of ``kib`` KiB at ``place``; yields what enlarges it."""
    place.mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
        if done.returncode:
            raise Skipped(f"no file system can be mounted here ({done.stderr.strip().partition(': ')[2]})")

    if shutil.which("mount") is None:
        raise Skipped("there is no mount command here")
    mount("-t", "tmpfs", "-o", f"size={kib}k{',ro' * read_only}", "none")
    try:
        yield lambda: mount("-o", "remount,size=64m")
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _belong_to_nobody(box: Box) -> None:
    if os.getuid() != 0:
        raise Skipped("only the superuser can act as another user")
    for path in (box.root, *box.root.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    box.root.parent.chmod(0o755)


def _as_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
