"""One run folder: configuration, provenance and results."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from lowrank_cli.errors import UserError, nearest
from lowrank_cli.reader import check, leaves, read_json, read_json_lines, read_yaml, shown
from lowrank_cli.runs.files import atomic_write, remove_leftovers, write_json
from lowrank_cli.runs.new_folder import discard, new_folder, settled
from lowrank_cli.runs.process import peak_memory_bytes, reset_peak_memory, this_process
from lowrank_cli.runs.provenance import config_hash, cpu_name, git_state, package_versions, untested_versions
from lowrank_cli.runs.records import RECORDS, HistoryRow, MethodSection, RunInfo
from lowrank_cli.schema import VERBS

DONE, FAILED, INTERRUPTED, RUNNING, PENDING = "done", "failed", "interrupted", "running", "pending"


class Run:
    """One run folder. ``info`` is run.json as last read or written.

    With ``writes=False`` (in all processes of a data-parallel run but the first) writing methods do nothing.
    """

    def __init__(self, path: Path, info: dict[str, Any], *, writes: bool = True):
        self.path = path
        self.info = info
        self.writes = writes
        self.listeners: list[Callable[[Mapping[str, Any]], object]] = []  #: called with each row that is logged
        self._began = time.monotonic()  # s

    @classmethod
    def create(
        cls,
        outputs: str | os.PathLike[str],
        *,
        stage: str,
        config: dict[str, Any],
        choices: Mapping[str, str],
        overrides: list[str],
        command: str,
        name: str | None = None,
        folder: str | os.PathLike[str] | None = None,
        status: str = RUNNING,
    ) -> Run:
        """Make a folder under ``outputs`` (or ``folder`` itself) with config.yaml and run.json.

        Args:
            choices: the config groups that were chosen, such as ``{"method": "lora"}``.
            name: a suffix for the name of the new folder.
        """
        model = config.get("model", {}).get("name")  # a recipe names none
        if folder is None:
            # a prompt has no task
            groups = ("recipe", "study", "method", "model", *([] if stage in ("generate", "serve") else ["task"]))
            kind = ["recipe"] if "recipe" in choices else [] if "method" in choices else [stage]
            names = dict(choices) | ({"model": model} if model else {})
            parts = kind + [names[group] for group in groups if group in choices]
            path = new_folder(outputs, "-".join([*parts, *([name] if name else [])]))
        else:
            path = Path(folder)
            path.mkdir(parents=True, exist_ok=True)
        run = cls(path, {})
        try:
            run.write_text("config.yaml", _yaml(config))
            run.update(
                status=status,
                stage=stage,
                command=command,
                overrides=list(overrides),
                choices=dict(choices),
                model=model,
                seed=config.get("seed"),
                config_hash=config_hash(config),
                git=git_state(),
                packages=package_versions(),
                untested=list(untested_versions()),
                python=platform.python_version(),
                platform=platform.platform(),
                device=cpu_name(),
                started=_now(),
            )
        except BaseException:  # a full disk, a signal
            if folder is None:
                discard(path, outputs)
            raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writes: bool = True, key: str = "run") -> Run:
        """The run in an existing folder. Raises UserError, naming the setting ``key``, if there is no intact one."""
        path = settled(path)
        if not os.path.isdir(path):  # False, not an error, for an invalid path
            beside = [file.parent.name for name in ("run", "sweep") for file in path.parent.glob(f"*/{name}.json")]
            hint = nearest(path.name, beside)
            raise UserError(f"{key}: there is no folder '{path}'{hint} (lrk list runs shows what there is)")
        if not (path / "run.json").exists():
            if (path / "sweep.json").is_file():
                raise UserError(f"{key}: '{path}' is a sweep; name one of its jobs")
            raise UserError(f"{key}: '{path}' is not a run folder (it holds no run.json)")
        try:
            info = read_json(path / "run.json", RunInfo)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        return cls(path, info, writes=writes)

    def file(self, relative: str | os.PathLike[str]) -> Path:
        """A path inside the folder; makes its parent. Raises UserError for a path that leads outside."""
        root = self.path.resolve()
        path = (root / relative).resolve()
        if root not in path.parents:
            raise UserError(f"'{relative}' lies outside the run folder '{self.path}'")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to history.jsonl, and pass it to the listeners."""
        if self.writes:
            with self.file("history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for listener in self.listeners:
                listener(row)

    def history(self) -> list[dict[str, Any]]:
        """The lines of history.jsonl, without a last one that a kill cut short."""
        path = self.path / "history.jsonl"
        return read_json_lines(path, HistoryRow) if path.exists() else []

    def rewind(self, step: int, *, evaluated: bool = True) -> None:
        """Drop what a resumed run will log again: the history after ``step``, and unless ``evaluated`` its dev loss."""
        rows = [row for row in self.history() if row["step"] < step + (evaluated or "dev/loss" not in row)]
        self.write_text("history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def write_text(self, relative: str, text: str) -> None:
        """Replace a file of the folder."""
        if self.writes:
            atomic_write(self.file(relative), text)

    def write_json(self, relative: str, value: Any) -> None:
        """Replace a JSON file of the folder."""
        if self.writes:
            write_json(self.file(relative), value)

    def read_json(self, relative: str, kind: Any = None) -> Any:
        """A JSON file of the folder. Raises UserError unless it is of type ``kind`` (default: in :data:`RECORDS`)."""
        return read_json(self.path / relative, kind or RECORDS.get(relative, Any))

    def config(self, *needed: str) -> dict[str, Any]:
        """config.yaml as plain values, with at least the dotted keys ``needed``.

        Raises:
            UserError: it cannot be read, lacks a key, has a value of the wrong type, an interpolation or a
                ``_target_``, or was altered after the run began.
        """
        path = self.path / "config.yaml"
        config = read_yaml(path)
        check(config, VERBS[self.info["stage"]], str(path))
        check(config.get("method", {}), MethodSection, str(path), "method")
        for key, value in leaves(config, str(path)):
            if isinstance(value, str) and "${" in value:
                raise UserError(f"{path}: {key} is {shown(value)}; expected a plain value, as nothing is interpolated")
            if value == "_target_":
                raise UserError(f"{path}: {key or 'it'} holds _target_; expected plain values, as nothing is called")
        for key in needed:
            inside: Any = config
            for name in key.split("."):
                if name not in inside:
                    raise UserError(f"{path}: {key} is missing")
                inside = inside[name]
        if config_hash(config) != self.info["config_hash"]:
            raise UserError(f"{path}: it was altered after the run began (its hash is not the one in run.json)")
        return config

    def lineage(self) -> Iterator[Run]:
        """This run, the run that it reads (``run=``), and so on.

        Raises UserError if one of them is missing or broken, or if they form a circle.
        """
        run, seen = self, {self.path.resolve()}
        yield run
        while (path := run.config().get("run")) is not None:
            run = Run.open(path)
            if run.path.resolve() in seen:
                raise UserError(f"run: '{path}' reads itself, through its own run=")
            seen.add(run.path.resolve())
            yield run

    def update(self, **fields: Any) -> None:
        """Change fields of run.json."""
        self.info.update(fields)
        self.write_json("run.json", self.info)

    @property
    def metrics(self) -> dict[str, float]:
        """metrics.json; empty until the run is completed."""
        return self.read_json("metrics.json") if self.completed else {}

    def finish(self, metrics: Mapping[str, float]) -> None:
        self.complete(metrics)
        self._end(DONE)

    @property
    def done(self) -> bool:
        return self.info.get("status") == DONE

    def begin(self) -> None:
        """Start, or resume, a pending, interrupted or failed run, and clean up after a kill."""
        again = self.info.get("status") != PENDING
        remove_leftovers(self.path)  # a pending run may have some too
        for key in ("error", "exit_code", "ended", "diverged"):
            self.info.pop(key, None)
        self._began = time.monotonic()
        reset_peak_memory()
        self.update(status=RUNNING, process=this_process(), **{"resumed" if again else "started": _now()})

    def complete(self, metrics: Mapping[str, float]) -> None:
        """Write the final metrics. What is still to be done, such as plots, needs no model."""
        self.write_json("metrics.json", dict(metrics))
        self._note_memory()
        self.update()

    def set_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.yaml``, and its hash into ``run.json``."""
        self.write_text("config.yaml", _yaml(config))
        self.update(config_hash=config_hash(config))

    @property
    def completed(self) -> bool:
        """Whether :meth:`complete` was called, by this process or an earlier one."""
        return (self.path / "metrics.json").is_file()

    def fail(self, error: str, exit_code: int = 1, **fields: Any) -> None:
        self._end(FAILED, error=error, exit_code=exit_code, **fields)

    def interrupt(self) -> None:
        self._end(INTERRUPTED)

    def _end(self, status: str, **fields: Any) -> None:
        took = time.monotonic() - self._began
        self.info.pop("process", None)
        before = self.info.get("seconds", 0)  # of earlier processes, if resumed
        self._note_memory()
        self.update(status=status, ended=_now(), seconds=round(before + took, 3), **fields)

    def _note_memory(self) -> None:
        self.info["peak_memory_bytes"] = max(peak_memory_bytes(), self.info.get("peak_memory_bytes", 0))


def _yaml(config: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110)
    return text


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
