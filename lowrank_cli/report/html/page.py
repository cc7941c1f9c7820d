"""``lrk report``: one HTML file about a run, a sweep, a study or a folder of runs, which needs no network.

Whatever comes from run folders is data: the template escapes it, drawings are serialized by ElementTree, and the
page's policy allows its own style and script only, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

from lowrank_cli.errors import UserError, escaped, inside, writing
from lowrank_cli.reader import read_json
from lowrank_cli.report.compare import build_comparison
from lowrank_cli.report.html import compared, study
from lowrank_cli.report.html.compared import SectionView
from lowrank_cli.report.html.predictions import Row
from lowrank_cli.report.html.run_view import RunView, view
from lowrank_cli.report.path_format import shown
from lowrank_cli.report.run_results import locate
from lowrank_cli.runs import PENDING, atomic_write

FILE = "report.html"
ANSWERS = 20_000  #: predictions on one page, about 4 MB; the page says how many it leaves out
HERE = Path(__file__).parent


@dataclass
class Entry:
    """A run on the page."""

    run: RunView
    name: str
    id: str  #: of the element that holds its answers
    answers: list[Row]  #: as many as fit
    folder: str = ""  #: its path from the page's folder
    link: str = ""  #: the same as a URL that ends in a slash


@dataclass
class Page:
    """What a page shows, from top to bottom."""

    title: str
    subtitle: str = ""
    status: str = ""
    summary: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    sections: list[SectionView] = field(default_factory=list)
    runs: list[Entry] = field(default_factory=list)
    alone: bool = False  #: whether the page is about its one run


def write(paths: Sequence[str], baseline: str | None, output: str | None, outputs: str) -> Path:
    """Write the page about ``paths`` and return its file.

    Args:
        paths: folders of runs, sweeps, recipes or studies, or folders that hold such; one that is not here is looked up
            in ``outputs``. Without any it is ``outputs/latest``.
        baseline: the method that others are tested against; a study names its own.
        output: the file; else ``report.html`` in the one folder, or here for several.

    Raises:
        UserError: a path is no folder, or holds no runs; ``output`` is a folder; ``baseline`` is not among the methods.
    """
    with inside("compare", "report"):
        folders = [locate(path, outputs) for path in paths or ["latest"]]
    file = Path(output) if output is not None else (folders[0] if len(folders) == 1 else Path()) / FILE
    if file.is_dir():
        raise UserError(f"--output: '{output}' is a folder; name a file, such as {file / FILE}")
    if not file.parent.is_dir():
        raise UserError(f"--output: there is no folder '{file.parent}'")
    page = _page(folders, baseline)
    _hide(page, folders)
    for entry in page.runs:
        relative = Path(os.path.relpath(entry.run.path, file.resolve().parent)).as_posix()
        entry.folder = entry.run.path.name if relative == "." else relative
        entry.link = f"{quote(relative)}/"
    with writing("--output", file) if output is not None else nullcontext():
        atomic_write(file, render(page))
    return file


def _hide(page: Page, folders: Sequence[Path]) -> None:
    """Take the paths of this machine out of what could not be read: a page is published."""

    def hidden(lines: list[str]) -> list[str]:
        return [reduce(lambda text, folder: text.replace(f"{folder}/", ""), folders, line) for line in lines]

    page.problems = hidden(page.problems)
    for section in page.sections:
        section.notes = hidden(section.notes)
        section.rows = [hidden(list(row)) for row in section.rows]
    for entry in page.runs:
        entry.run.problems = hidden(entry.run.problems)


def _page(folders: list[Path], baseline: str | None) -> Page:
    if len(folders) == 1 and study.is_study(folders[0]):
        return _study_page(folders[0], baseline)
    paths = {path: None for folder in folders for path in _runs_in(folder)}
    if not paths:
        raise UserError(f"report: there are no runs in {', '.join(map(shown, folders))} (a run has a run.json)")
    runs = [view(path) for path in paths]
    if len(runs) == 1:
        alone = runs[0]
        return Page(alone.title, status=alone.status, runs=_entries(runs), alone=True)
    page = Page(folders[0].name if len(folders) == 1 else f"{len(runs)} runs", runs=_entries(runs))
    page.subtitle = _statuses(runs)
    _add_comparison(page, folders, baseline)
    return page


def _runs_in(folder: Path) -> list[Path]:
    """The run folders in ``folder``, itself included, by name; of a recipe its stages."""
    paths = sorted(file.parent for file in folder.rglob("run.json"))
    holders = {parent for path in paths for parent in path.parents}
    return [path for path in paths if path not in holders]


def _study_page(folder: Path, baseline: str | None) -> Page:
    page = Page(folder.name, status=_status(folder))
    try:
        ledger = study.read(folder)
    except UserError as error:
        page.problems.append(str(error))
        return page
    page.title = ledger["name"]
    names = study.run_folders(folder, ledger)
    runs = [view(path) if path.is_dir() else RunView(path, path.name, PENDING) for _, path in names]
    tasks = [task for of_group in ledger["groups"].values() for task in of_group]
    sizes = _counted(ledger["arms"], "arm"), _counted(tasks, "task"), _counted(ledger["seeds"], "seed")
    page.subtitle = f"{', '.join(sizes)}; baseline {ledger['baseline']}; runs: {_statuses(runs)}"
    _add_comparison(page, [folder], baseline)
    for sections, problems in (study.tuning(folder, ledger), study.failures(folder)):
        page.sections += sections
        page.problems += problems
    titles = {path: name for name, path in names}
    page.runs = _entries(runs, titles)
    return page


def _statuses(runs: Sequence[RunView]) -> str:
    """How many runs have each status: ``9 done, 1 failed``."""
    return ", ".join(f"{number} {status}" for status, number in Counter(run.status for run in runs).items())


def _counted(things: Sequence[Any], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _status(folder: Path) -> str:
    """The status of a study's folder, which has a run.json of its own."""
    try:
        return str(read_json(folder / "run.json", dict[str, Any]).get("status", ""))
    except UserError:
        return ""


def _add_comparison(page: Page, folders: list[Path], baseline: str | None) -> None:
    """Compare what is finished. Where nothing is, the page says so and lists the runs."""
    try:
        comparison = build_comparison(folders, baseline=baseline)
    except UserError as error:
        if str(error).startswith("--baseline"):
            raise
        page.problems.append(str(error).removeprefix("compare: "))
        return
    page.summary = compared.summary(comparison)
    page.sections += compared.sections(comparison)


def _entries(runs: Sequence[RunView], names: dict[Path, str] | None = None) -> list[Entry]:
    """The runs with their answers, as far as these fit on the page."""
    room, entries = ANSWERS, []
    for index, run in enumerate(runs):
        answers = run.predictions[:room]
        room -= len(answers)
        entries.append(Entry(run, (names or {}).get(run.path, run.title), f"answers-{index}", answers))
    return entries


def render(page: Page) -> str:
    """The page as HTML."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    template = environment.from_string((HERE / "template.html.j2").read_text(encoding="utf-8"))
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return template.render(
        page=page, style=style, script=script, policy=policy, version=version("lowrank-cli"), made=made
    )


def _visible(value: Any) -> Any:
    """Control characters of a text are shown, not obeyed; markup is the page's own."""
    return escaped(value) if type(value) is str else value


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
