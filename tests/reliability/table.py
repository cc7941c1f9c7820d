"""The record of a campaign, its summary for a terminal, and its table in the documentation."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from .trial import Result


def read(record: Path) -> dict[tuple[str, int], Result]:
    """The trials of a record, the last of each."""
    if not record.is_file():
        return {}
    rows = [Result(**json.loads(line)) for line in record.read_text(encoding="utf-8").splitlines()]
    return {(row.family, row.seed): row for row in rows}


def append(record: Path, result: Result) -> None:
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result.as_dict()) + "\n")


def summarise(results: Iterable[Result]) -> None:
    """Counts by family, and failures by their reasons, each with the first trial that shows it."""
    results = list(results)
    for family in dict.fromkeys(result.family for result in results):
        own = [result for result in results if result.family == family]
        states = Counter(result.status for result in own)
        print(f"{family}: {len(own)} trials, " + ", ".join(f"{states[s]} {s}" for s in ("passed", "failed", "skipped")))
        for reason in dict.fromkeys(result.reason for result in own if result.status == "skipped"):
            print(f"    skipped: {reason}")
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        if result.status == "failed":
            groups[result.family, result.reason.partition(" at lowrank_cli")[2] or result.reason].append(result)
    for same in sorted(groups.values(), key=len, reverse=True):
        print(f"{len(same):5} × {same[0].reason}\n        {same[0].what}\n        {same[0].again}")


def write(results: Iterable[Result], docs: Path) -> None:
    raise NotImplementedError
