"""Finished runs, grouped into the sections and rows of a comparison.

Runs of one model on one task make a section; in it a row is a method with one setting (the configuration keys
that vary there, seed apart), so different ranks or learning rates are never pooled. A row holds one value a
seed. Its name has the values that most of the section's runs do not share; the shared ones are above the table.
An adapter that was measured with other values than it was trained with is a row of its own, ``trained.KEY=VALUE``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from lowrank_cli.errors import UserError, nearest
from lowrank_cli.report import path_format
from lowrank_cli.report.comparison import Row, Section
from lowrank_cli.report.metric_names import lower_is_better, main_metric
from lowrank_cli.report.statistics import median_interval
from lowrank_cli.runs import Run
from lowrank_cli.runs.records import STUDY

ADAPTERS = ("train", "import", "prune")  #: stages that leave an adapter; the others measure one
#: Keys that name a run or change its speed, not what it learns or predicts.
IRRELEVANT = {
    "seed",
    "outputs",
    "name",
    "run",
    "evaluate.split",
    "test",
    "evaluate.batch_size",
    "score.tokens",
    "hardware.threads",
    "tracker",
    "method.setting",  # its name stands for it, its layers may differ from seed to seed
    "method.layers",
    "method.ranks",  # those of method.rank_pattern
    "train.log_every",
    "train.checkpoint_every",
}

#: Keys that say out of which data the examples come.
DATA = re.compile(r"task\.(parts\.[^.]+\.)?(hub|subset|path|generator|splits|dev_split|test_split)")

TRAINED = "trained."  #: begins a key of how the adapter was trained, where the run that measured it was set otherwise

Setting = tuple[tuple[str, str], ...]  #: keys and values


@dataclass
class Result:
    """A finished run, as far as a comparison needs it."""

    path: Path
    method: str
    model: str
    task: str
    seed: int
    started: str
    config: dict[str, str]  #: dotted key → value as JSON, without ``IRRELEVANT``
    metrics: dict[str, float]
    seconds: float | None  #: of training
    memory: int | None
    source: Path | None  #: the run whose adapter an evaluation read
    modules: Any  #: what a setting keeps, which goes by its name
    answers: dict[str, Path]  #: split → run folder whose ``predictions.jsonl`` is of it


@dataclass
class Collected:
    """The runs in some folders."""

    results: list[Result]  #: of finished runs, evaluations joined to their training
    unfinished: int
    broken: list[str]  #: why each broken run cannot be read
    in_studies: int  #: runs in the folders of studies, which are left out: they include those of tuning


def collect(paths: Sequence[str], outputs: str) -> Collected:
    """The runs in ``paths``. Raises UserError if none of them is finished."""
    folders: dict[Path, None] = {}
    in_studies = 0
    for path in paths:
        root = locate(path, outputs)
        inside = [file.parent.resolve() for file in sorted(root.rglob("run.json"))]
        if not inside:
            raise UserError(f"compare: '{path}' is no run and holds none (a run has a run.json)")
        studies = {file.parent.resolve() for file in root.rglob(STUDY)}
        single = [folder for folder in inside if studies.isdisjoint([folder, *folder.parents])]
        in_studies += len(inside) - len(single)
        folders.update(dict.fromkeys(single))
    done: dict[Path, Result] = {}
    unfinished, broken = 0, []
    for folder in folders:
        try:
            run = Run.open(folder)
            if not {"method", "model", "task"} <= run.info.get("choices", {}).keys():
                continue  # a recipe or a benchmark
            if run.done and run.metrics:
                done[folder] = result_of(run)
            else:
                unfinished += 1
        except UserError as error:
            broken.append(str(error).removeprefix("run: "))
    if not done:
        why = f"; {len(broken)} broken: {broken[0]}" if broken else ""
        studies_too = f"; {in_studies} in studies, which are compared by their own folders" if in_studies else ""
        where = ", ".join(map(str, paths))
        raise UserError(f"compare: no finished runs in {where} ({unfinished} not finished{why}{studies_too})")
    return Collected(_join(done), unfinished, broken, in_studies)


def locate(path: str, outputs: str) -> Path:
    """The folder of a path given on the command line: from here, else in ``outputs``. Raises UserError if none."""
    for folder in (Path(path), Path(outputs) / path):
        if folder.is_dir():
            return folder.resolve()
    if Path(path).is_absolute():
        raise UserError(f"compare: there is no folder '{path}'")
    parents = [parent for parent in (Path(path).parent, (Path(outputs) / path).parent) if parent.is_dir()]
    siblings = [entry.name for parent in parents for entry in parent.iterdir() if entry.is_dir()]
    raise UserError(f"compare: there is no folder '{path}'{nearest(Path(path).name, siblings)}")


def result_of(run: Run) -> Result:
    """What a comparison needs of a finished run."""
    info = run.info
    config, stages = _lineage(run)
    _drop_unused(config)
    if stages:
        config["adapter"] = " + ".join(stages)
    config["trained"] = _trained_otherwise(run, config)
    own = run.config()
    measured = own.get("run") if info.get("stage") not in ADAPTERS else None
    metrics = {k: v for k, v in run.metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    split = own.get("evaluate", {}).get("split", "test" if own.get("test", True) else "dev")
    return Result(
        path=run.path.resolve(),
        method=info["choices"]["method"],
        model=info.get("model") or info["choices"]["model"],
        task=info["choices"]["task"],
        seed=config["seed"],
        started=info.get("started", ""),
        config={key: value for key, value in _flat(config) if not IRRELEVANT & {key, key.rpartition(".")[0]}},
        metrics=metrics,
        seconds=metrics.get("train/seconds"),
        memory=info.get("device_memory_bytes", info.get("peak_memory_bytes")),
        source=Path(measured).resolve() if measured else None,
        modules=config.get("method", {}).get("layers"),
        answers={split: run.path.resolve()} if (run.path / "predictions.jsonl").is_file() else {},
    )


def present_lineage(run: Run) -> Iterator[Run]:
    """The run, the one whose adapter it reads, and so on, as far as they are still there."""
    for one in run.lineage():
        yield one
        below = one.config().get("run")
        if below is None or not (Path(below) / "run.json").exists():
            return


def _lineage(run: Run) -> tuple[dict[str, Any], list[str]]:
    """A run's settings on top of those of the runs that its adapter came from, and the stages that made the adapter.

    The seed is that of the first training.
    """
    runs = list(present_lineage(run))
    config: dict[str, Any] = {}
    stages: list[str] = []
    scored = False
    for earlier in reversed(runs):
        own = earlier.config("seed")
        if scored:
            own.pop("score", None)  # a pruning of what was scored scores nothing
        if (earlier.path / "statistics").is_dir():
            own.pop("train", None)  # a method that calibrates takes no steps
        config = {**config, **own, "seed": config.get("seed", own["seed"])}
        stages += [earlier.info["stage"]] if earlier.info["stage"] in ADAPTERS else []
        scored = earlier.info["stage"] == "score"
    return config, stages


def _drop_unused(config: dict[str, Any]) -> None:
    """Remove settings that the runs of this kind of model, answer and method do not read."""
    task, evaluate, method = (config.get(section, {}) for section in ("task", "evaluate", "method"))
    encoder = config.get("model", {}).get("kind") == "encoder"
    unused = {
        "template": encoder,
        "templates": encoder or "templates" not in method,
        "text": not encoder,
        "max_new_tokens": task.get("answer") in ("labels", "choices"),
        "extract": task.get("answer") in ("labels", "choices"),
    }
    for key in (key for key, drop in unused.items() if drop):
        task.pop(key, None)
    if task.get("answer") in ("labels", "choices"):
        evaluate.pop("num_beams", None)


def _trained_otherwise(run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """What the adapter that a run measured was trained with, where ``config`` says otherwise; statistics are fitted."""
    training = (
        own for own in present_lineage(run) if own.info["stage"] == "train" and not (own.path / "statistics").is_dir()
    )
    first = next(training, None)
    if first is None:  # it may be gone
        return {}
    trained = first.config()
    differing: dict[str, Any] = {}
    for group in ("method", "task", "hardware"):
        then, now = trained.get(group, {}), config.get(group, {})
        if then.get("name") != now.get("name"):
            differing[group] = then.get("name")
            continue
        used = dict(_flat(now))
        for key, value in _flat(then):
            full = f"{group}.{key}"
            if key in used and used[key] != value and not IRRELEVANT & {full, full.rpartition(".")[0]}:
                differing[key] = json.loads(value)
    return differing


def _flat(config: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if not isinstance(config, dict):
        yield prefix[:-1], json.dumps(config)
        return
    for key, value in config.items():
        yield from _flat(value, f"{prefix}{key}.")


def _join(results: dict[Path, Result]) -> list[Result]:
    """Evaluations of a training that is here too, in its own setting, only add their metrics to it."""
    joined = {path: result for path, result in results.items() if result.source not in results}
    for path, result in results.items():
        if path in joined or result.source is None:
            continue
        training = joined.get(result.source)
        if training is not None and all(result.config.get(k, v) == v for k, v in training.config.items()):
            joined[result.source] = replace(
                training,
                metrics={**result.metrics, **training.metrics},
                answers={**result.answers, **training.answers},
            )
        else:
            joined[path] = result
    return list(joined.values())


def sections_of(results: list[Result], metric: str | None) -> list[Section]:
    """The runs of one model on one task, by ``metric`` or else by the task's own: a section for each test set.

    Runs that were measured on different examples are never compared. One section without rows if none has the metric.
    """
    metric = metric or own_metric(results)
    measured = [result for result in results if metric in result.metrics]
    by_set = by_test_set(measured, metric) or {results[0].task: []}
    sections = [_section(results[0].model, task, metric, members) for task, members in by_set.items()]
    sections[0].without_metric = len(results) - len(measured)
    for section in sections:
        section.others = len(sections) > 1
    return sections


def by_test_set(results: Iterable[Result], metric: str) -> dict[str, list[Result]]:
    """The results by the examples that ``metric`` was measured on; where these differ, the task's name tells them.

    They are the same if they are as many, out of the same data.
    """
    split = metric.partition("/")[0]
    sets: dict[tuple[float | None, Setting], list[Result]] = {}
    for result in results:
        source = sorted((key, value) for key, value in result.config.items() if DATA.fullmatch(key))
        sets.setdefault((result.metrics.get(f"{split}/examples"), tuple(source)), []).append(result)
    if len(sets) < 2:
        return {members[0].task: members for members in sets.values()}
    common = set.intersection(*(set(source) for _, source in sets))
    named = {}
    for (examples, data), members in sets.items():
        others = "".join(
            f", {key.partition('.')[2]}={_value(value)}" for key, value in data if (key, value) not in common
        )
        count = "unknown examples" if examples is None else f"{examples:.0f} examples"
        named[f"{members[0].task}, {count}{others}"] = members
    return named


def _section(model: str, task: str, metric: str, measured: list[Result]) -> Section:
    rows: dict[tuple[str, Setting], dict[int, Result]] = {}
    clashes = 0
    for result in sorted(measured, key=lambda result: result.started):  # of a seed the newest run counts
        by_seed = rows.setdefault((result.method, _setting(result, measured)), {})
        clashes += result.seed in by_seed and by_seed[result.seed].modules != result.modules
        by_seed[result.seed] = result
    names, shared = _names(rows)
    made = [row_of(method, names[method, setting], metric, by_seed) for (method, setting), by_seed in rows.items()]
    section = new_section(model, task, metric, made)
    section.repeats = len(measured) - sum(len(row.values) for row in made)
    section.clashes, section.shared = clashes, shared
    return section


def new_section(model: str, task: str, metric: str, rows: Sequence[Row]) -> Section:
    """A section with its rows from best median to worst."""
    lower = lower_is_better(metric)
    return Section(model, task, metric, lower, sorted(rows, key=lambda row: row.median if lower else -row.median))


def own_metric(results: list[Result]) -> str:
    """The task's metric on the test split, else the next best quality metric that any run has."""
    own = {result.config.get("task.metric", '""').strip('"') for result in results}
    return main_metric((name for result in results for name in result.metrics), own)


def _setting(result: Result, section: list[Result]) -> Setting:
    """Keys that vary in the section and, of the method's own keys, among the runs of that method.

    Keys of how it was trained are always part of it: such a run is not one of those trained in that setting.
    """
    setting = []
    for key, value in sorted(result.config.items()):
        peers = [r for r in section if r.method == result.method] if key.startswith("method.") else section
        if key.startswith(TRAINED) or len({peer.config.get(key, value) for peer in peers}) > 1:
            setting.append((key, value))
    return tuple(setting)


def _names(rows: dict[tuple[str, Setting], dict[int, Result]]) -> tuple[dict[tuple[str, Setting], str], str]:
    """Each row's setting in short, and the values that most rows share.

    Keys are their last word, where no other one ends with it. Where several keys vary besides the methods' own, a value
    that more than half of the runs have is left out, unless two rows would then have the same name.
    """
    runs = Counter(item for (_, setting), by_seed in rows.items() for item in setting for _ in by_seed)
    keys = {key for key, _ in runs}
    ends = Counter(key.rpartition(".")[2] for key in keys if not key.startswith(TRAINED))

    def shown(items: Iterable[tuple[str, str]]) -> str:
        short = {key: key if key.startswith(TRAINED) else key.rpartition(".")[2] for key in keys}
        return " ".join(f"{short[key] if ends[short[key]] == 1 else key}={_value(value)}" for key, value in items)

    common = {key for key in keys if not key.startswith(("method.", TRAINED))}
    of_key = {key: sum(count for (other, _), count in runs.items() if other == key) for key in common}
    shared = (
        {(k, v) for (k, v), count in runs.items() if k in common and 2 * count > of_key[k]} if len(common) > 1 else ()
    )
    names = {(method, setting): shown(i for i in setting if i not in shared) for method, setting in rows}
    taken = Counter((method, name) for (method, _), name in names.items())
    whole = {row: name if taken[row[0], name] == 1 else shown(row[1]) for row, name in names.items()}
    return whole, shown(sorted(shared))


def _value(value: str) -> str:
    """A JSON value as it is typed; a folder from here."""
    plain = value.replace('"', "")
    return path_format.shown(plain) if plain.startswith("/") else plain


def row_of(method: str, setting: str, metric: str, by_seed: Mapping[int, Result]) -> Row:
    """The row of runs that differ by their seed alone; all have ``metric``."""
    results = dict(sorted(by_seed.items()))
    split = metric.partition("/")[0]

    def middle(read: Callable[[Result], float | None]) -> float | None:
        known = [value for value in map(read, results.values()) if value is not None]
        return median(known) if known else None

    row = empty_row(method, setting, {seed: result.metrics[metric] for seed, result in results.items()})
    row.runs = {seed: [result.path] for seed, result in results.items()}
    row.answers = {seed: [result.answers[split]] for seed, result in results.items() if split in result.answers}
    row.trainable = middle(lambda result: result.metrics.get("trainable_parameters"))
    row.activated = middle(lambda result: result.metrics.get("activated_parameters"))
    row.seconds = middle(lambda result: result.seconds)
    row.memory = middle(lambda result: result.memory)
    row.arrangement_std = middle(lambda result: result.metrics.get(f"{metric}_std"))
    row.arrangement_worst = middle(lambda result: result.metrics.get(f"{metric}_worst"))
    return row


def empty_row(method: str, setting: str, values: dict[int, float]) -> Row:
    """A row of values by seed, without runs and costs."""
    numbers = list(values.values())
    low, high = median_interval(numbers)
    std = stdev(numbers) if len(numbers) > 1 else None
    return Row(method, setting, values, median(numbers), low, high, fmean(numbers), std)
