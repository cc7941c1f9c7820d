"""What the page shows of one run, from its folder alone. What cannot be read becomes one line in ``problems``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_text
from lowrank_cli.report import number_format, tables
from lowrank_cli.report.html import predictions
from lowrank_cli.report.html.charts import figures, history
from lowrank_cli.report.html.charts.svg import NOT_DRAWABLE, Chart
from lowrank_cli.report.metric_names import in_words, quality
from lowrank_cli.runs import Run, is_gone
from lowrank_cli.schema import parse_overrides

T = TypeVar("T")

COUNTED = ("parameters", "tokens_per_second")  #: endings of metrics shown with three digits and a unit


@dataclass
class RunView:
    """One run on the page."""

    path: Path
    title: str
    status: str = "broken"
    headline: str = ""  #: its first quality metric
    command: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    chosen: list[tuple[str, str]] = field(default_factory=list)  #: keys that were set, and their values
    config: str = ""  #: config.yaml
    quality: list[tuple[str, str]] = field(default_factory=list)
    metrics: list[tuple[str, str]] = field(default_factory=list)
    packages: list[tuple[str, str]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    predictions: list[predictions.Row] = field(default_factory=list)
    error: str = ""
    problems: list[str] = field(default_factory=list)


def view(path: Path) -> RunView:
    """The run in the folder ``path``; one that cannot be opened has nothing but a problem."""
    try:
        run = Run.open(path)
    except UserError as error:
        return RunView(path, path.name, problems=[str(error).removeprefix("run: ")])
    info = run.info
    shown = RunView(path, tables.run_title(info), status_of(run), error=str(info.get("error") or ""))
    metrics: dict[str, Any] = _read(shown, lambda: run.metrics) or {}
    named = [name for name in quality(metrics) if not name.endswith(("_std", "_worst"))]
    if named:
        shown.headline = f"{in_words(named[0])} {metric(named[0], metrics[named[0]])}"
    shown.quality = [(in_words(name), metric(name, metrics[name])) for name in named[:4]]
    shown.metrics = [(name, metric(name, value)) for name, value in metrics.items()]
    shown.command = str(info.get("command") or "")
    shown.facts = list(_facts(info))
    shown.chosen = _chosen(info)
    versions = {"Python": info.get("python"), **_mapping(info.get("packages"))}
    shown.packages = [(str(name), str(version)) for name, version in versions.items() if version]
    if (path / "config.yaml").is_file():
        shown.config = _read(shown, lambda: read_text(path / "config.yaml", "YAML")) or ""
    shown.charts = _read(shown, lambda: history.charts(run.history())) or []
    if (path / "figures.json").is_file():
        for entry in _read(shown, lambda: run.read_json("figures.json")) or []:
            if (drawn := _read(shown, partial(figures.chart, entry))) is not None:
                shown.charts.append(drawn)
    shown.predictions = _read(shown, lambda: predictions.rows(run, metrics)) or []
    return shown


def _read(shown: RunView, reader: Callable[[], T]) -> T | None:
    """What ``reader`` returns; None, and a line in the problems, if the folder's files do not allow it."""
    try:
        return reader()
    except UserError as error:
        shown.problems.append(str(error))
    except NOT_DRAWABLE as error:
        shown.problems.append(f"history.jsonl cannot be drawn ({type(error).__name__}: {error})")
    return None


def status_of(run: Run) -> str:
    """The status in run.json; a run whose process was killed could not note its end."""
    gone = is_gone(run.info.get("process"), run.path / "run.json")
    return "interrupted" if gone else str(run.info["status"])


def metric(name: str, value: Any) -> str:
    """A metric's value, with a unit where its name says which."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return tables.NONE if value is None else str(value)
    if name.endswith("seconds"):
        return number_format.duration(value)
    if name.endswith("bytes"):
        return number_format.size(value)
    return number_format.count(value) if name.endswith(COUNTED) else number_format.number(value)


def _facts(info: dict[str, Any]) -> list[tuple[str, str]]:
    choices, git = info.get("choices") or {}, _mapping(info.get("git"))
    commit = str(git.get("commit") or "")[:9] + (" (changed)" if git.get("dirty") else "")
    memory = info.get("device_memory_bytes")
    facts = [
        ("method", choices.get("method")),
        ("model", info.get("model") or choices.get("model")),
        ("task", choices.get("task")),
        ("stage", info.get("stage")),
        ("seed", info.get("seed")),
        ("started", str(info.get("started") or "")[:19].replace("T", " ")),
        ("time", number_format.duration(info["seconds"]) if info.get("seconds") is not None else None),
        ("memory", number_format.size(info["peak_memory_bytes"]) if info.get("peak_memory_bytes") else None),
        ("GPU memory", number_format.size(memory) if memory else None),
        ("device", info.get("device")),
        ("commit", commit),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _mapping(value: Any) -> dict[str, Any]:
    """What run.json has under a key that no schema checks."""
    return value if isinstance(value, dict) else {}


def _chosen(info: dict[str, Any]) -> list[tuple[str, str]]:
    """The groups that were chosen, then every key that the command set."""
    groups = {str(group): str(name) for group, name in (info.get("choices") or {}).items()}
    typed = {item.key: item.value for item in parse_overrides(info.get("overrides") or []) if item.sets}
    return list((groups | typed).items())
