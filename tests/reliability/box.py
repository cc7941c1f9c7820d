"""The folder of one trial: a working directory, what lies beside it, and traps for code and secrets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from .command import Command, Ended
from .trial import Failed, judge

SECRET = "s3cr3t-of-the-environment"
PRECIOUS = "of somebody else\n"
SECRET_NAME = "LRK_TRIAL_SECRET"
SLOW = 30.0  #: s that one command may take
CLOCK = ("seconds", "per_second")  #: parts of the names of what a clock measured


class Box:
    """``root/work`` is the working directory of the commands.

    ``root/executed`` exists once given code has run, and ``root/precious`` is a file that no command may change.
    """

    def __init__(self, root: Path, home: Path):
        self.root, self.home = root, home
        self.work = root / "work"
        self.work.mkdir(parents=True)
        self.executed = root / "executed"
        self.precious = root / "precious"
        self.precious.write_text(PRECIOUS)
        self.commands: list[Ended] = []
        self.case = ""  #: what the seed drew, in words

    def start(self, *arguments: str, prepare: Callable[[], None] | None = None, cwd: Path | None = None) -> Command:
        """``lrk ARGUMENTS``, started."""
        environment = {SECRET_NAME: SECRET, "TMPDIR": str(self.root), "COLUMNS": "200"}
        return Command(arguments, cwd or self.work, (self.root, self.home), environment, prepare)

    def run(
        self,
        *arguments: str,
        names: Collection[str] = (),
        codes: Collection[int] = (0, 1, 2),
        prepare: Callable[[], None] | None = None,
        timeout: float = SLOW,
    ) -> Ended:
        """``lrk ARGUMENTS``, ended and judged."""
        return self.judged(self.start(*arguments, prepare=prepare).wait(timeout), names, codes)

    def judged(self, ended: Ended, names: Collection[str] = (), codes: Collection[int] = (0, 1, 2)) -> Ended:
        """``ended`` where it did right, and neither ran given code nor gave a secret away."""
        self.commands.append(ended)
        if self.executed.exists():
            raise Failed("code of a given file was executed")
        if self.precious.read_text() != PRECIOUS:
            raise Failed("a file outside the working directory was changed")
        if SECRET in ended.out + ended.err:
            raise Failed("an environment variable was shown")
        judge(ended, names=names, codes=codes)
        for path in self.root.rglob("*"):
            text = path.suffix in (".yaml", ".json", ".jsonl", ".txt") and path.is_file() and not path.is_symlink()
            if text and path.stat().st_size < 1 << 20 and SECRET.encode() in path.read_bytes():
                raise Failed(f"an environment variable was written into {path.name}")
        return ended

    def snapshot(self, below: Path | None = None) -> dict[str, str]:
        """Every file by its path, with what tells a change of it."""
        found = {}
        for folder, _, names in os.walk(below or self.root):
            for name in names:
                path = Path(folder, name)
                status = path.lstat()
                found[str(path.relative_to(self.root))] = f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
        return found


def outcome(run: Path) -> dict[str, Any]:
    """What a run computed, without what a clock measured: history, metrics, answers and the adapter's weights."""
    found: dict[str, Any] = {}
    for name in ("history.jsonl", "predictions.jsonl"):
        if (run / name).is_file():
            found[name] = [_row(line) for line in (run / name).read_text().splitlines()]
    for name in ("metrics.json", "scores.json"):
        if (run / name).is_file():
            found[name] = _timeless(json.loads((run / name).read_text()))
    for path in sorted(run.glob("adapter/*.safetensors")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _row(line: str) -> Any:
    try:
        return _timeless(json.loads(line))
    except (ValueError, RecursionError):  # as a trial has changed it
        return line


def same(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Raise :class:`Failed` where two outcomes differ, and say in what."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            raise Failed(f"{what}: {name} is {'missing' if name in expected else 'new'}")
        if found[name] != expected[name]:
            raise Failed(f"{what}: {name} differs{_first(found[name], expected[name])}")


def _first(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)]
        return f" in {min(keys)}: {found.get(min(keys))!r}, not {expected.get(min(keys))!r}"[:200]
    if isinstance(found, list) and isinstance(expected, list):
        at = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
        return f" in line {at + 1} ({len(found)} lines, not {len(expected)})"
    return ""


def _timeless(row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    return {key: value for key, value in row.items() if not any(part in key for part in CLOCK)}
