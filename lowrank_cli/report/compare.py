"""``lrk compare``: methods side by side over seeds, with intervals, paired tests and no winner by chance.

:func:`build_comparison` returns the comparison as data, for other reports and for scripts:

    build_comparison(paths, baseline=None, metric=None, outputs="outputs", across_tasks=False) -> Comparison

Its sections hold rows (values, runs and costs by seed, medians, intervals) and their differences from the baseline; see
:mod:`lowrank_cli.report.comparison`. ``paths`` may be the folder of one study, finished or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType

from lowrank_cli.errors import UserError, unknown, writing
from lowrank_cli.report import formats
from lowrank_cli.report.across_tasks import across_tasks as results_across_tasks
from lowrank_cli.report.comparison import Comparison
from lowrank_cli.report.differences import compare_with_baseline, mark_best, mark_pareto
from lowrank_cli.report.percent import in_percent
from lowrank_cli.report.run_results import Result, collect, locate, sections_of
from lowrank_cli.report.study_results import read_study, study_sections
from lowrank_cli.runs.records import STUDY


def compare(
    paths: Sequence[str],
    baseline: str | None,
    metric: str | None,
    output: str | None,
    outputs: str,
    across_tasks: bool = False,
    percent: bool = False,
) -> RenderableType:
    """What ``lrk compare`` prints; arguments as in :func:`build_comparison`.

    Args:
        percent: show accuracy and other shares in percent.
        output: a folder to write the comparison to, in every format of :mod:`lowrank_cli.report.formats`.
    """
    folder = None if output is None else Path(output)
    for part in [folder, *folder.parents] if folder is not None else []:
        if part.exists() and not part.is_dir():
            raise UserError(f"--output: '{part}' is a file; name a folder")
    comparison = build_comparison(paths, baseline=baseline, metric=metric, outputs=outputs, across_tasks=across_tasks)
    if folder is not None:
        with writing("--output", folder):
            formats.write(comparison, folder, percent=percent)
    return formats.terminal(in_percent(comparison) if percent else comparison)


def build_comparison(
    paths: Sequence[str | Path],
    *,
    baseline: str | None = None,
    metric: str | None = None,
    outputs: str = "outputs",
    across_tasks: bool = False,
) -> Comparison:
    """Compare the finished runs in ``paths``: the folder of one study, or runs, sweeps, recipes and folders of them.

    A study may have no finished run at all; the comparison then has no sections and says how many cells are missing.

    Args:
        paths: empty for everything in ``outputs``. A relative path that is not here is looked up there.
        baseline: a method, or ``"method setting"`` where it has several; the others are tested against it, paired by
            seed. Of a study it defaults to the study's.
        metric: defaults to each task's own on the test split.
        across_tasks: also test the methods over all tasks together. Always done for a study with several tasks.

    Raises:
        UserError: a path without finished runs, an unknown baseline or metric, a study next to other paths.
    """
    folders = [locate(str(path), outputs) for path in paths or [outputs]]
    studies = [folder for folder in folders if (folder / STUDY).is_file()]
    if studies and len(folders) > 1:
        raise UserError(f"compare: '{studies[0]}' is a study, which is compared alone")
    if studies:
        comparison = _of_study(studies[0], baseline, metric)
    else:
        comparison = _of_runs([str(path) for path in paths or [outputs]], outputs, baseline, metric, across_tasks)
    for section in comparison.sections:
        mark_best(section)
        mark_pareto(section)
    if comparison.baseline is not None and comparison.sections:
        compare_with_baseline(comparison.sections, comparison.baseline)
    if across_tasks or comparison.study is not None:
        comparison.across_tasks = results_across_tasks(comparison.sections)
    if across_tasks and comparison.study is None and not comparison.across_tasks:
        raise UserError("--across-tasks: no method shares seeds with the baseline on two tasks of a model")
    return comparison


def _of_study(folder: Path, baseline: str | None, metric: str | None) -> Comparison:
    study = read_study(folder)
    if metric is not None and metric not in study.metrics and study.missing < study.cells:
        raise unknown("--metric", metric, sorted(study.metrics))
    sections = study_sections(study, metric)
    names = {row.method for section in sections for row in section.rows}
    own = study.record["baseline"]
    return Comparison(
        sections,
        baseline or (own if own in names else None),
        broken=study.broken,
        study=study.record["name"],
        cells=study.cells,
        missing=study.missing,
        absent=study.absent,
    )


def _of_runs(
    paths: Sequence[str], outputs: str, baseline: str | None, metric: str | None, across_tasks: bool
) -> Comparison:
    if across_tasks and baseline is None:
        raise UserError("--across-tasks: methods are tested against a baseline; name it with --baseline METHOD")
    collected = collect(paths, outputs)
    present = sorted({name for result in collected.results for name in result.metrics})
    if metric is not None and metric not in present:
        raise unknown("--metric", metric, present)
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in collected.results:
        groups.setdefault((result.model, result.task), []).append(result)
    sections = [section for _, members in sorted(groups.items()) for section in sections_of(members, metric)]
    sections = [section for section in sections if section.rows]
    if not sections:
        raise UserError("compare: none of these runs has a finite test or dev metric; name one with --metric")
    return Comparison(
        sections,
        baseline,
        unfinished=collected.unfinished,
        broken=collected.broken,
        in_studies=collected.in_studies,
    )
