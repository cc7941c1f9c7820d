"""Two processes must not work in one run folder."""

from __future__ import annotations

from pathlib import Path

from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_json
from lowrank_cli.report import path_format
from lowrank_cli.runs import is_alive, this_process
from lowrank_cli.runs.process import LAPSE
from lowrank_cli.runs.records import Working

RECORDS = ("run.json", "sweep.json")  #: files that name the process working in their folder
LEVELS = 6  #: folders from a run up to the study that contains it


def refuse_running(folder: Path, key: str = "--resume") -> None:
    """Refuse a folder in which a process works: in itself, in a run inside it, or in the run that contains it."""
    above = [parent / name for parent in list(folder.absolute().parents)[:LEVELS] for name in RECORDS]
    for file in (*above, *(path for name in RECORDS for path in folder.rglob(name))):
        process = read_json(file, Working).get("process") if file.is_file() else None
        if process is not None and process != this_process() and is_alive(process, file):
            where, machine = path_format.shown(file.parent), process["host"]
            if machine != this_process()["host"]:
                patience = f"; after a kill, wait {LAPSE * process['beat']} s"
                raise UserError(f"{key}: '{where}' is running on '{machine}'; end that first{patience}")
            raise UserError(f"{key}: '{where}' is running (process {process['pid']}); end that first")
