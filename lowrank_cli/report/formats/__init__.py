"""A comparison in every form: terminal, Markdown, CSV, LaTeX, plots, and the layout of PEFT's method comparison."""

from __future__ import annotations

from pathlib import Path

from lowrank_cli.report.comparison import Comparison
from lowrank_cli.report.formats import figures, peft
from lowrank_cli.report.formats.csv_file import csv_text
from lowrank_cli.report.formats.latex import latex
from lowrank_cli.report.formats.markdown import markdown
from lowrank_cli.report.formats.terminal import terminal
from lowrank_cli.report.percent import in_percent
from lowrank_cli.runs import atomic_write

__all__ = ["csv_text", "latex", "markdown", "terminal", "write"]


def write(comparison: Comparison, folder: Path, *, percent: bool = False) -> None:
    """Write ``compare.md``, ``compare.csv``, ``compare.tex``, plots and ``method_comparison/`` to ``folder``.

    ``percent``: shares are in percent in what people read, that is all but CSV and JSON.
    """
    shown = in_percent(comparison) if percent else comparison
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "compare.md", markdown(shown))
    if comparison.sections:
        atomic_write(folder / "compare.csv", csv_text(comparison))
        atomic_write(folder / "compare.tex", latex(shown))
        figures.write(shown, folder)
        peft.write(comparison, folder / "method_comparison")
