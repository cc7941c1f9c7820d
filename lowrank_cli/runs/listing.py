"""Finding runs in the outputs folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowrank_cli.errors import UserError
from lowrank_cli.runs.run import Run


def child(folder: Path, name: str) -> Path:
    """The folder ``name`` in ``folder``. Raises UserError for a link that leads out of it."""
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise UserError(f"'{path}' lies outside '{folder}'")
    return path


def scan(outputs: str | os.PathLike[str]) -> tuple[list[Run], dict[Path, UserError]]:
    """Every run under ``outputs``, jobs of sweeps and stages of recipes too, oldest first; and the unreadable ones."""
    runs, broken = [], {}
    for depth in ("*/*", "*/*/*", "*/*/*/*"):  # a run; a job or a stage; a stage of a job
        for file in Path(outputs).glob(f"{depth}/run.json"):
            if file.relative_to(outputs).parts[0] != "latest":
                try:
                    runs.append(Run.open(file.parent))
                except UserError as error:
                    broken[file.parent] = error
    return sorted(runs, key=lambda run: (run.info.get("started", ""), run.path)), dict(sorted(broken.items()))


def all_runs(outputs: str | os.PathLike[str]) -> list[Run]:
    """Every readable run under ``outputs``, oldest first."""
    return scan(outputs)[0]


def find(
    path: str | os.PathLike[str] | None,
    stages: Sequence[str],
    outputs: str | os.PathLike[str],
    choices: Mapping[str, str] | None = None,
    also: Mapping[str, str] | None = None,
    model: str | None = None,
) -> Run:
    """The finished run at ``path``; for None the newest finished one.

    Args:
        stages: the run must be of one of these.
        choices: config groups that the newest run must have been made with.
        also: further groups for the command that the error suggests.
        model: the model's own name, which the newest run must have too.

    Raises:
        UserError: there is no such run; the message says how to make one.
    """
    if path is None:
        wanted = (choices or {}).items()
        for run in reversed(all_runs(outputs)):
            fits = run.done and run.info.get("stage") in stages and wanted <= run.info.get("choices", {}).items()
            if fits and model in (None, run.info.get("model")):
                return run
        groups, others = ("".join(f" {k}={v}" for k, v in items) for items in (wanted, (also or {}).items()))
        of = f" of{groups}" if groups else ""
        raise UserError(f"run: no finished run{of} under '{outputs}'; start one with: lrk {stages[0]}{groups}{others}")
    run = Run.open(path)
    if (run.path / "recipe.json").is_file():
        raise UserError(f"run: '{path}' is a recipe; name one of its stages")
    stage = run.info.get("stage")
    if stage not in stages:
        earlier = run.config().get("run")
        read = f"; it read run={earlier}" if earlier else ""
        raise UserError(f"run: '{path}' is a run of {stage}, not of {' or '.join(stages)}{read}")
    if not run.done:
        raise UserError(
            f"run: '{path}' is not finished (it is {run.info.get('status')}); "
            f"continue it with: lrk {stage} --resume {shlex.quote(str(path))}"
        )
    return run
