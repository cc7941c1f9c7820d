"""Types of the JSON files in a run folder that are read again; see :mod:`lowrank_cli.reader`."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

from lowrank_cli.reader import Count, Finite, PlainName, Where
from lowrank_cli.schema import VERBS

Stage = Annotated[str, Where(VERBS.__contains__, f"one of {', '.join(VERBS)}")]
STATUSES = ("done", "failed", "interrupted", "running", "pending")
Status = Annotated[str, Where(STATUSES.__contains__, f"one of {', '.join(STATUSES)}")]
Picture = Annotated[PlainName, Where(lambda name: name.endswith(".png"), "the name of a .png file")]
Table = list[list[float | None]]


class Process(TypedDict):
    """The process that works on a run."""

    host: str
    pid: Count
    began: int | None
    beat: NotRequired[Count]  # s between heartbeats; earlier versions had none


class ChosenThreads(TypedDict):
    """Number of CPU threads that a run began with, and why."""

    count: Annotated[int, Where(range(1, 1025).__contains__, "a whole number, 1 to 1024")]
    reason: str


class TrackerRun(TypedDict):
    """The run of an experiment tracker that a resumed run continues."""

    name: str
    id: PlainName


class RunInfo(TypedDict):
    """``run.json``."""

    stage: Stage
    status: Status
    config_hash: str
    choices: NotRequired[dict[str, str]]
    overrides: NotRequired[list[str]]
    command: NotRequired[str]
    seed: NotRequired[int | None]
    started: NotRequired[str]
    git: NotRequired[dict[str, Any] | None]
    packages: NotRequired[dict[str, str]]
    seconds: NotRequired[Finite]
    peak_memory_bytes: NotRequired[Count]
    device_memory_bytes: NotRequired[Count]
    threads: NotRequired[ChosenThreads]
    attention: NotRequired[str | None]
    process: NotRequired[Process | None]
    tracker: NotRequired[TrackerRun]
    error: NotRequired[str]
    exit_code: NotRequired[int]
    diverged: NotRequired[bool]


class MethodSection(TypedDict):
    """``method`` in config.yaml: the keys that all methods share."""

    name: NotRequired[str]


class Working(TypedDict):
    """The working process in run.json and sweep.json."""

    process: NotRequired[Process | None]


HistoryRow = TypedDict(
    "HistoryRow",
    {
        "step": Count,
        "train/loss": NotRequired[float | None],
        "dev/loss": NotRequired[float | None],
        "learning_rate": NotRequired[float | None],
        "train/tokens": NotRequired[Count],
    },
)


class Figure(TypedDict):
    """One entry of ``figures.json``; see :func:`lowrank_cli.report.plots.draw`."""

    file: Picture
    kind: Annotated[
        str,
        Where(
            ("heatmap", "heatmaps", "lines", "box", "bubbles", "bars").__contains__,
            "one of heatmap, heatmaps, lines, box, bubbles, bars",
        ),
    ]
    title: str
    rows: list[str | int | float]
    columns: NotRequired[list[str | int | float]]
    values: NotRequired[Table]
    label: NotRequired[str]
    row_label: NotRequired[str]
    column_label: NotRequired[str]
    low: NotRequired[Table]
    high: NotRequired[Table]
    sizes: NotRequired[Table]
    size_label: NotRequired[str]
    outlined: NotRequired[list[list[bool]]]
    scale: NotRequired[list[Finite]]
    panels: NotRequired[list[dict[str, Any]]]
    panel_of: NotRequired[list[str]]
    panel_rows: NotRequired[list[str]]


class Arrangement(TypedDict):
    """One entry of ``arrangements.json``; it also holds the metric, under its name."""

    draw: int
    permutation: int
    template: int


class BenchRecord(TypedDict):
    """``bench.json``."""

    bench: dict[str, Any]
    rows: list[dict[str, Any]]
    memory: NotRequired[str]  #: what peak memory is, where it is measured
    title: NotRequired[str]
    notes: NotRequired[list[str]]


class Layers(TypedDict):
    """``setting.yaml``, as ``lrk prune`` writes it."""

    name: str
    layers: dict[str | int, list[str]]
    scores: dict[str | int, dict[str, Finite]]


STUDY, TRIALS = "study.json", "tuning.json"  #: in a study's folder; the first marks it
FAILURES = "failures.json"  #: there too: run folder → the first line of why it failed


class ViewRecord(TypedDict):
    """Another metric of an arm's runs, see :class:`lowrank_cli.schema.study.StudyView`."""

    arm: PlainName
    metric: str
    bound: bool


class StudyRecord(TypedDict):
    """``study.json``: what is compared."""

    name: str
    baseline: PlainName
    arms: list[PlainName]
    pools: NotRequired[dict[PlainName, list[PlainName]]]
    views: NotRequired[dict[PlainName, ViewRecord]]
    seeds: list[int]
    groups: dict[PlainName, list[PlainName]]  #: group → tasks
    config_dir: NotRequired[str | None]
    launcher: NotRequired[list[str]]  #: overrides of Hydra's launcher; none where the study starts the runs itself


class Trial(TypedDict):
    """One setting that tuning tried."""

    values: dict[str, Any]
    part: NotRequired[Annotated[int, Where(lambda part: part >= 1, "a whole number, 1 or more")]]  #: of successive
    # halving: it trained for 1 / part of the steps
    scores: NotRequired[dict[str, Finite | None]]  #: seed → metric, null where the run failed
    mean: Finite | None  #: null where a run failed


class Tuned(TypedDict):
    """One entry of ``tuning.json``: the trials of an arm on a task, and what was chosen."""

    group: PlainName
    task: PlainName
    arm: PlainName
    metric: str
    lower_is_better: bool
    seeds: NotRequired[list[int]]
    keys: list[str]
    trials: list[Trial]
    best: dict[str, Any] | None  #: null where every trial failed
    #: ``lower`` or ``upper`` for each key whose best value lies at that end of what was searched; earlier
    #: versions wrote the keys alone
    at_edge: dict[str, Annotated[str, Where(("lower", "upper").__contains__, "lower or upper")]] | list[str]


#: Kind of each file that :meth:`lowrank_cli.runs.Run.read_json` knows by its name.
RECORDS: dict[str, Any] = {
    "metrics.json": dict[str, float | None],
    "figures.json": list[Figure],
    "arrangements.json": list[Arrangement],
    "bench.json": BenchRecord,
    STUDY: StudyRecord,
    TRIALS: list[Tuned],
    FAILURES: dict[str, str],
}
