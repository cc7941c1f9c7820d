"""The record of a campaign, its summary for a terminal, and its table in the documentation."""

from __future__ import annotations

import json
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median

from .trial import Result

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- campaign -->", "<!-- end of campaign -->"


def read(record: Path) -> dict[tuple[str, int], Result]:
    """The trials of a record that were made of the present code, the last of each."""
    if not record.is_file():
        return {}
    rows, now = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()], commit()
    results = [Result(**row["trial"]) for row in rows if row["commit"] == now]
    return {(result.family, result.seed): result for result in results}


def append(record: Path, result: Result) -> None:
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"commit": commit(), "trial": asdict(result)}) + "\n")


@cache
def commit() -> str:
    """The commit that is checked out, and whether the package differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = "-dirty" if git("status", "--porcelain", "lowrank_cli", "conf", "tests/reliability") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


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


def write(results: Iterable[Result], titles: Mapping[str, str], docs: Path) -> None:
    """The tables between the marks of ``reliability.md``, and the same numbers as ``results/reliability.json``."""
    results = list(results)
    families = []
    for family in titles:
        own = [result for result in results if result.family == family]
        states = Counter(result.status for result in own)
        reasons = sorted({result.reason for result in own if result.status == "skipped"})
        failed = [{"trial": r.again, "what": r.what, "why": r.reason} for r in own if r.status == "failed"]
        families.append(
            {"family": family, "trials": len(own), **states, "skipped because": reasons, "failures": failed}
        )
    stops = []
    for key, times in sorted(_figures(results).items()):
        verb, _, name = key.rpartition(" ")
        middle, slowest = round(median(times), 2), round(max(times), 2)
        stops.append({"verb": verb, "signal": name, "stops": len(times), "median s": middle, "longest s": slowest})
    values = {"commit": commit(), "families": families, "stops": stops}
    (docs / "results" / "reliability.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    lines = ["| family | what | trials | failures | skipped |", "|---|---|---:|---:|---:|"]
    for row in families:
        counts = f"{row['trials']} | {row.get('failed', 0)} | {row.get('skipped', 0)}"
        lines.append(f"| `{row['family']}` | {titles[row['family']]} | {counts} |")
    lines += ["", "| stopped verb | signal | stops | median, s | longest, s |", "|---|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(str(value) for value in row.values())} |" for row in stops]
    page = docs / "explanation" / "reliability.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n".join([f"Commit {values['commit']}.", "", *lines])
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _figures(results: Iterable[Result]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for result in results:
        for key, value in (result.figures or {}).items():
            found[key].append(value)
    return found
