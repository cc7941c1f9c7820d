"""Run folders: what ran, with what, what came out. Every file but the history is replaced atomically.

One run is ``outputs/<date>/<time>-<method>-<model>-<task>[-<name>]/`` and holds

- ``config.yaml``: the composed configuration, exactly what ran
- ``run.json``: status, stage, command, overrides, seed, hash, versions, device, times, memory
- ``history.jsonl``: one line for each logged step
- ``metrics.json``: flat numbers, once the run is done
- ``error.txt``: the traceback, where a bug ended the run

and what its stage adds (``adapter/``, ``checkpoints/``, ``predictions.jsonl``, ``plots/``, …).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from lowrank_cli.errors import UserError

DONE, FAILED, INTERRUPTED, RUNNING, PENDING = "done", "failed", "interrupted", "running", "pending"
PACKAGES = (
    "lowrank-cli",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "hydra-core",
    "numpy",
)
ROOT = Path(__file__).resolve().parent.parent


class Run:
    """One run folder. ``info`` is run.json as last read or written.

    With ``writes=False`` (every process of a data-parallel run but the first) what would write does nothing.
    """

    def __init__(self, path: Path, info: dict[str, Any], *, writes: bool = True):
        self.path = path
        self.info = info
        self.writes = writes
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
        """Make a new folder under ``outputs`` (or exactly ``folder``), with its config.yaml and run.json."""
        if folder is None:
            groups = ("recipe", "method", "model", "task")
            parts = ["recipe"] * ("recipe" in choices) + [choices[group] for group in groups if group in choices]
            path = new_folder(outputs, "-".join([*parts, *([name] if name else [])]))
        else:
            path = Path(folder)
            path.mkdir(parents=True, exist_ok=True)
        run = cls(path, {})
        run.write_text("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110))
        run.update(
            status=status,
            stage=stage,
            command=command,
            overrides=list(overrides),
            choices=dict(choices),
            seed=config.get("seed"),
            config_hash=config_hash(config),
            git=git_state(),
            packages=package_versions(),
            python=platform.python_version(),
            platform=platform.platform(),
            device=cpu_name(),
            started=_now(),
        )
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writes: bool = True) -> Run:
        """The run in an existing folder; :class:`UserError` where there is none."""
        path = Path(path)
        if path.is_symlink():
            path = path.parent / path.readlink()  # ``latest`` moves on, the run's own name does not
        if not path.is_dir():
            raise UserError(f"run: there is no folder '{path}' (lrk list runs shows what there is)")
        try:
            info = json.loads((path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            if (path / "sweep.json").is_file():
                raise UserError(f"run: '{path}' is a sweep; name one of its jobs") from None
            raise UserError(f"run: '{path}' is not a run folder (it holds no run.json)") from None
        except (OSError, ValueError) as error:
            raise UserError(f"run: '{path / 'run.json'}' cannot be read: {error}") from None
        return cls(path, info, writes=writes)

    def file(self, relative: str | os.PathLike[str]) -> Path:
        """A path inside the folder, its parent made; :class:`UserError` for one that would leave it."""
        root = self.path.resolve()
        path = (root / relative).resolve()
        if root not in path.parents:
            raise UserError(f"'{relative}' lies outside the run folder '{self.path}'")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to history.jsonl."""
        if self.writes:
            with self.file("history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The lines of history.jsonl; one cut short by a killed process is left out."""
        rows = []
        with suppress(FileNotFoundError):
            for line in (self.path / "history.jsonl").read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):
                    rows.append(json.loads(line))
        return rows

    def rewind(self, step: int) -> None:
        """Drop history after ``step``: what a resumed run is about to repeat."""
        rows = [row for row in self.history() if row.get("step", 0) <= step]
        self.write_text("history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def write_text(self, relative: str, text: str) -> None:
        """Replace a file of the folder."""
        if self.writes:
            atomic_write(self.file(relative), text)

    def write_json(self, relative: str, value: Any) -> None:
        """Replace a JSON file of the folder."""
        if self.writes:
            write_json(self.file(relative), value)

    def read_json(self, relative: str) -> Any:
        """Read a JSON file of the folder; :class:`UserError` where it is missing or broken."""
        return read_json(self.path / relative)

    def config(self) -> dict[str, Any]:
        """config.yaml as plain values."""
        path = self.path / "config.yaml"
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(config, dict):
                return config
            error: object = "it holds no keys"
        except (OSError, yaml.YAMLError) as caught:
            error = caught
        raise UserError(f"'{path}' cannot be read: {error}")

    def update(self, **fields: Any) -> None:
        """Change fields of run.json."""
        self.info.update(fields)
        self.write_json("run.json", self.info)

    @property
    def metrics(self) -> dict[str, float]:
        """metrics.json; empty while there is none."""
        return self.read_json("metrics.json") if (self.path / "metrics.json").is_file() else {}

    @property
    def done(self) -> bool:
        return self.info.get("status") == DONE

    def begin(self) -> None:
        """The work of a pending, interrupted or failed run starts (again)."""
        again = self.info.get("status") != PENDING
        for key in ("error", "exit_code", "ended"):
            self.info.pop(key, None)
        self._began = time.monotonic()
        self.update(status=RUNNING, **{"resumed" if again else "started": _now()})

    def finish(self, metrics: Mapping[str, float]) -> None:
        self.write_json("metrics.json", dict(metrics))
        self._end(DONE)

    def fail(self, error: str, exit_code: int = 1) -> None:
        self._end(FAILED, error=error, exit_code=exit_code)

    def interrupt(self) -> None:
        self._end(INTERRUPTED)

    def _end(self, status: str, **fields: Any) -> None:
        took = time.monotonic() - self._began
        before = self.info.get("seconds", 0)  # where this resumes an earlier process
        self.update(
            status=status,
            ended=_now(),
            seconds=round(before + took, 3),
            peak_memory_bytes=max(peak_memory_bytes(), self.info.get("peak_memory_bytes", 0)),
            **fields,
        )


def new_folder(outputs: str | os.PathLike[str], label: str) -> Path:
    """Make ``outputs/<date>/<time>-<label>``, unique within a second too; ``latest`` points there."""
    outputs, now = Path(outputs), datetime.now()
    label = re.sub(r"[^\w.+-]+", "-", label).strip("-.")
    stem = outputs / now.strftime("%Y-%m-%d") / f"{now.strftime('%H%M%S')}-{label}"
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        path, number = stem, 1
        while True:
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
                path = stem.with_name(f"{stem.name}-{number}")
        _point(outputs / "latest", path.relative_to(outputs))
    except OSError as error:
        raise UserError(f"outputs: cannot write to '{outputs}': {error.strerror or error}") from None
    return path


def _point(link: Path, target: Path) -> None:
    if link.exists() and not link.is_symlink():
        return  # a real folder of that name is the user's
    temporary = link.with_name(f".latest-{os.getpid()}-{target.name}")
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, link)


def discard(path: Path, outputs: str | os.PathLike[str]) -> None:
    """Take back a folder that :func:`new_folder` made, where the input turned out to be wrong."""
    outputs = Path(outputs)
    shutil.rmtree(path, ignore_errors=True)
    link = outputs / "latest"
    if link.is_symlink() and not link.exists():
        link.unlink()
        left = sorted(outputs.glob("*/*/"))
        if left:
            _point(link, left[-1].relative_to(outputs))
    with suppress(OSError):  # another run lives there
        path.parent.rmdir()
        outputs.rmdir()


def all_runs(outputs: str | os.PathLike[str]) -> list[Run]:
    """Every run under ``outputs``, jobs of sweeps and stages of recipes too, oldest first."""
    runs = []
    for depth in ("*/*", "*/*/*", "*/*/*/*"):  # a run; a job or a stage; a stage of a job
        for file in Path(outputs).glob(f"{depth}/run.json"):
            if file.relative_to(outputs).parts[0] != "latest":
                with suppress(UserError):  # a folder that is just being written
                    runs.append(Run.open(file.parent))
    return sorted(runs, key=lambda run: (run.info.get("started", ""), run.path))


def find(
    path: str | os.PathLike[str] | None,
    stage: str,
    outputs: str | os.PathLike[str],
    choices: Mapping[str, str] | None = None,
) -> Run:
    """The finished run of ``stage`` at ``path``, or else the newest one whose groups were ``choices``."""
    if path is None:
        wanted = (choices or {}).items()
        for run in reversed(all_runs(outputs)):
            if run.done and run.info.get("stage") == stage and wanted <= run.info.get("choices", {}).items():
                return run
        command = " ".join(["lrk", stage, *(f"{key}={value}" for key, value in wanted)])
        raise UserError(f"run: no finished run under '{outputs}'; start one with: {command}")
    run = Run.open(path)
    if (run.path / "recipe.json").is_file():
        raise UserError(f"run: '{path}' is a recipe; name one of its stages")
    if run.info.get("stage") != stage:
        raise UserError(f"run: '{path}' is a run of {run.info.get('stage')}, not of {stage}")
    if not run.done:
        raise UserError(
            f"run: '{path}' is not finished (it is {run.info.get('status')}); "
            f"continue it with: lrk {stage} --resume {path}"
        )
    return run


def read_json(path: Path) -> Any:
    """Parse a JSON file; :class:`UserError` where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace a file so that a reader, or a kill, sees the old content or the new one."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextmanager
def atomic_folder(final: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes ``final`` when the block ends well, and vanishes when it does not."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}-"))
    os.chmod(temporary, 0o777 & ~_umask())
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        with suppress(FileNotFoundError):
            os.replace(final, old)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of what decides the result: the configuration without where it is written."""
    content = {key: value for key, value in config.items() if key not in ("outputs", "name")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def git_state() -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout that this package lies in; None for an installed one."""
    if not (ROOT / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git here, or no commit yet
        return None


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    versions = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def cpu_name() -> str:
    """The processor as the system calls it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
