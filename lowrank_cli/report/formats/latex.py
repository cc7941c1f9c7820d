"""A comparison as LaTeX tables, for ``\\input`` in a paper that loads ``booktabs``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowrank_cli.report.comparison import AcrossTasks, Comparison, Difference, Row, Section
from lowrank_cli.report.formats.columns import across_title
from lowrank_cli.report.number_format import count, number, signed

ESCAPES = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "·": r"\textperiodcentered{}",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
}
NONE = "--"


def escape(text: str) -> str:
    """``text`` as LaTeX prints it."""
    return "".join(ESCAPES.get(character, character) for character in text)


def latex(comparison: Comparison) -> str:
    """A table for each section and for each model over all tasks; the best row of a section is bold."""
    tables = [_section(section, comparison.baseline) for section in comparison.sections]
    for model in dict.fromkeys(result.model for result in comparison.across_tasks):
        results = [result for result in comparison.across_tasks if result.model == model]
        tables.append(_across(across_title(model, comparison), results))
    return "\n".join(["% needs \\usepackage{booktabs}", *tables])


def _section(section: Section, baseline: str | None) -> str:
    settings = any(row.setting for row in section.rows)
    headers = ["Method", *(["Setting"] if settings else []), "$n$", "Median", r"Mean $\pm$ std"]
    if baseline is not None:
        headers += [r"$\Delta$", r"95\,\% interval", r"$p_{\mathrm{Holm}}$", "Detectable"]
    headers.append("Parameters")
    lines = [_row(row, settings, baseline) for row in section.rows]
    against = f" $\\Delta$: mean difference from {escape(baseline)}, paired by seed." if baseline is not None else ""
    bounds = r" $\dagger$: a bound, found with the test labels." if any(row.bound for row in section.rows) else ""
    return _table(
        f"{escape(section.title)}.{against}{bounds}", f"{section.model}-{section.task}", 1 + settings, headers, lines
    )


def _row(row: Row, settings: bool, baseline: str | None) -> list[str]:
    mean = number(row.mean) if row.std is None else f"${number(row.mean)} \\pm {number(row.std)}$"
    name = escape(row.method) + (r"$^\dagger$" if row.bound else "")
    cells = [name, *([escape(row.setting)] if settings else []), str(len(row.values))]
    cells += [number(row.median), mean, *(_difference(row.difference) if baseline is not None else [])]
    cells.append(NONE if row.trainable is None else count(row.trainable))
    return [f"\\textbf{{{cells[0]}}}", *cells[1:]] if row.best else cells


def _difference(difference: Difference | None) -> list[str]:
    if difference is None:
        return [NONE] * 4
    return _estimate(difference.mean, difference.low, difference.high, difference.p_holm, difference.detectable)


def _across(title: str, results: Sequence[AcrossTasks]) -> str:
    headers = ["Method", "Tasks", "Pairs", r"$\Delta$", r"95\,\% interval", r"$p_{\mathrm{Holm}}$", "Detectable"]
    lines = [
        [escape(r.method), str(r.tasks), str(r.pairs), *_estimate(r.mean, r.low, r.high, r.p_holm, r.detectable)]
        for r in results
    ]
    return _table(f"{escape(title)}.", f"{results[0].model}-all", 1, headers, lines)


def _estimate(
    mean: float, low: float | None, high: float | None, p: float | None, detectable: float | None
) -> list[str]:
    return [
        f"${signed(mean)}$",
        NONE if low is None or high is None else f"$[{signed(low)}, {signed(high)}]$",
        NONE if p is None else f"{p:.3f}" if p >= 0.001 else "$<0.001$",
        NONE if detectable is None else f"$\\pm{number(detectable)}$",
    ]


def _table(caption: str, label: str, texts: int, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A floating table whose first ``texts`` columns are left-aligned."""
    rows = [f"    {' & '.join(line)} \\\\" for line in lines]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{caption}}}",
            f"  \\label{{tab:{re.sub(r'[^A-Za-z0-9-]+', '-', label)}}}",
            f"  \\begin{{tabular}}{{{'l' * texts}{'r' * (len(headers) - texts)}}}",
            r"    \toprule",
            f"    {' & '.join(headers)} \\\\",
            r"    \midrule",
            *rows,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )
