"""The sections and the summary of a comparison, as the page shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lowrank_cli.report.comparison import AcrossTasks, Comparison, Difference, Section
from lowrank_cli.report.formats.columns import Columns, across_columns, interval, section_columns
from lowrank_cli.report.formats.footnotes import footnotes
from lowrank_cli.report.html.charts import comparisons
from lowrank_cli.report.html.charts.svg import NOT_DRAWABLE, Chart
from lowrank_cli.report.number_format import number


@dataclass
class SectionView:
    """One section of the page: a table, charts, and what to know about them."""

    title: str
    subtitle: str = ""
    warnings: list[str] = field(default_factory=list)
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    left: int = 1  #: columns of text, aligned to the left
    strong: Sequence[int] = ()  #: rows in bold
    fold: str = ""  #: name of the table, if it is folded below the charts
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sections(comparison: Comparison) -> list[SectionView]:
    """A section for each model and task, then one for all tasks of a model together."""
    views = [_section(section, comparison) for section in comparison.sections]
    for model in dict.fromkeys(result.model for result in comparison.across_tasks):
        results = [result for result in comparison.across_tasks if result.model == model]
        title = name_of(comparison, model, "all tasks together")
        views.append(_table(title, f"Differences from {comparison.baseline}", across_columns(results)))
    if views:
        views[-1].notes += footnotes(comparison)
    return views


def name_of(comparison: Comparison, model: str, task: str) -> str:
    """A task with its model, or in a study with its group where there are several."""
    models = {section.model for section in comparison.sections}
    return task if comparison.study is not None and len(models) == 1 else f"{model} · {task}"


def _section(section: Section, comparison: Comparison) -> SectionView:
    better = "lower" if section.lower_is_better else "higher"
    about = "; ".join(filter(None, (f"{section.metric}, {better} is better", section.default_setting)))
    columns = section_columns(section, comparison.baseline)
    view = _table(name_of(comparison, section.model, section.task), about, columns)
    view.strong = [index for index, row in enumerate(section.rows) if row.best]
    try:
        view.charts = comparisons.of_section(section)
    except NOT_DRAWABLE:
        view.warnings.append("These values are too far apart to be drawn.")
    return view


def _table(title: str, subtitle: str, columns: Columns) -> SectionView:
    return SectionView(title, subtitle, headers=columns.headers, rows=columns.lines, left=columns.groups.count("label"))


def summary(comparison: Comparison) -> list[tuple[str, str]]:
    """The result in words, over all tasks and on each: where, what differs, and what could have been detected."""
    lines = []
    for model in dict.fromkeys(result.model for result in comparison.across_tasks):
        findings = [_Finding(r.method, r) for r in comparison.across_tasks if r.model == model]
        tasks = max(result.tasks for result in comparison.across_tasks if result.model == model)
        lines.append(
            (
                name_of(comparison, model, f"{tasks} tasks together"),
                _sentence(findings, comparison.baseline or "", _lower(comparison)),
            )
        )
    for section in comparison.sections:
        known = [row for row in section.rows if row.difference is not None and row.baseline is not None]
        compared = [row for row in known if not row.bound]
        findings = [_Finding(row.label, row.difference) for row in compared if row.difference is not None]
        if findings:
            baseline = next(row.baseline.label for row in compared if row.baseline is not None)
            where = f"{name_of(comparison, section.model, section.task)}, {section.metric}"
            lines.append((where, _sentence(findings, baseline, section.lower_is_better)))
    return lines


def _lower(comparison: Comparison) -> bool:
    return all(section.lower_is_better for section in comparison.sections)


@dataclass
class _Finding:
    """What was found of one row against the baseline."""

    label: str
    difference: Difference | AcrossTasks

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0, and p, corrected for the other rows, is below 0.05."""
        low, high, p_value = self.difference.low, self.difference.high, self.difference.p_holm
        if low is None or high is None or p_value is None:
            return False
        return (low > 0 or high < 0) and p_value < 0.05

    def claim(self, lower_is_better: bool) -> str:
        better = (self.difference.mean < 0) == lower_is_better
        around = interval(self.difference.low, self.difference.high)
        size = number(abs(self.difference.mean))
        only = "" if self.difference.pairs > 1 else " with the one seed that was compared"
        return f"{self.label} is {'better' if better else 'worse'} by {size}{only} (95 % interval {around})"


def _sentence(findings: Sequence[_Finding], baseline: str, lower_is_better: bool) -> str:
    said = [finding.claim(lower_is_better) for finding in findings if finding.is_clear]
    tested = [finding for finding in findings if finding.difference.p_value is not None]
    if untested := [finding.label for finding in findings if finding not in tested]:
        said.append(f"no test is possible for {' and '.join(untested)} (one seed, or no spread)")
    if unclear := [finding for finding in tested if not finding.is_clear]:
        limits = [limit for finding in unclear if (limit := finding.difference.detectable) is not None]
        power = f"; one of {number(max(limits))} would have been found with 80 % power" if limits else ""
        said.append(f"no difference found for {' and '.join(finding.label for finding in unclear)}{power}")
    return f"Against {baseline}: {'; '.join(said)}."
