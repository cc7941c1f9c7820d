"""Experiment trackers, through Accelerate's classes: they get what a run logs, its configuration and final metrics.

A tracker writes into the run folder, unless the usual environment variables of its library name a server. It never
changes a result: an error of a tracker turns it off with a warning, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

from lowrank_cli.errors import UserError, shorten
from lowrank_cli.runs import Run
from lowrank_cli.runs.progress import console

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "lowrank-cli"  #: name of the project or experiment, unless an environment variable sets it
WANDB_INIT_TIMEOUT = "30"  #: s until a server counts as down; W&B itself takes 90
MLFLOW_RETRIES = "4"  #: the same, with MLflow's growing pauses between them; MLflow itself takes 4 minutes


def require(name: str) -> None:
    """Raise UserError if the library of the tracker ``name`` is missing."""
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name, such as a tracker's own output, is no library
        raise UserError(f"tracker: {name} needs a library: pip install 'lowrank-cli[{name}]', or set tracker=none")


@contextmanager
def tracked(run: Run, name: str, step: int = 0) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Inside, the tracker ``name`` gets every row that the run logs.

    A resumed run continues the tracker's run, whose id run.json holds.

    Args:
        step: the step from which the run resumes, or 0.

    Yields:
        A function that takes the final metrics.

    Raises:
        UserError: the library is missing.
    """
    if name == "none" or not run.writes:
        yield lambda metrics: None
        return
    require(name)
    with _environment(_VARIABLES[name](run) if name in _VARIABLES else {}):
        tracker = _Tracker(run, name, step)
        run.listeners.append(tracker.log)
        try:
            yield tracker.finish
        finally:
            run.listeners.remove(tracker.log)
            tracker.close()


class _Tracker:
    """One of Accelerate's trackers, until its first error."""

    def __init__(self, run: Run, name: str, step: int):
        self._name, self._step = name, step
        self._tracker: GeneralTracker | None = None
        with self._guarded():
            known = run.info.get("tracker", {})
            earlier = known["id"] if known.get("name") == name else None
            self._tracker, tracker_id = _STARTS[name](run, earlier, step)
            if earlier is None:
                self._tracker.store_init_configuration(dict(_flat(run.config(), ".")))
            run.update(tracker={"name": name, "id": tracker_id})

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass on the numbers of a row; those in lists and mappings are named ``KEY/INNER``."""
        self._step = row["step"]
        self._send({key: value for key, value in row.items() if key != "step"})

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Pass on the final metrics as ``final/NAME``, since history has some of the names too."""
        self._send({f"final/{key}": value for key, value in metrics.items()})

    def close(self) -> None:
        with self._guarded():
            if self._tracker is not None:
                self._tracker.finish()

    def _send(self, values: Mapping[str, Any]) -> None:
        flat = _flat(values, "/")
        numbers = {key: value for key, value in flat if isinstance(value, int | float) and not isinstance(value, bool)}
        with self._guarded():
            if self._tracker is not None and numbers:
                self._tracker.log(numbers, step=self._step)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Keep what a library prints, its errors and its use of random numbers away from the run."""
        try:
            with redirect_stdout(StringIO()), _random_numbers_kept():
                yield
        except Exception as error:  # whatever a library, its service or its server raises
            self._tracker = None
            reason = shorten(" ".join(str(error).split()), 240) or type(error).__name__
            console().print(f"warning: tracker={self._name}: {reason}; the run goes on without it", soft_wrap=True)


def _tensorboard(run: Run, earlier: str | None, step: int) -> tuple[GeneralTracker, str]:
    from accelerate.tracking import TensorBoardTracker

    # purge_step hides what was logged after the step from which the run resumes
    tracker = TensorBoardTracker("", run.file("tensorboard"), purge_step=step + 1 if earlier else None)
    tracker.start()
    return tracker, "tensorboard"


def _wandb(run: Run, earlier: str | None, step: int) -> tuple[GeneralTracker, str]:
    from accelerate.tracking import WandBTracker

    tracker_id = earlier or uuid.uuid4().hex
    server = "WANDB_API_KEY" in os.environ or "WANDB_BASE_URL" in os.environ
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        dir=str(run.path.absolute()),
        id=tracker_id,
        name=os.environ.get("WANDB_NAME", run.path.name),
        resume="allow",
        mode=os.environ.get("WANDB_MODE", "online" if server else "offline"),
        settings={"console": "off", "silent": True},
    )
    tracker.start()
    return tracker, tracker_id


def _mlflow(run: Run, earlier: str | None, step: int) -> tuple[GeneralTracker, str]:
    from accelerate.tracking import MLflowTracker

    tracker = MLflowTracker(PROJECT, run_id=earlier, run_name=run.path.name)
    tracker.start()
    return tracker, tracker.tracker.info.run_id


def _trackio(run: Run, earlier: str | None, step: int) -> tuple[GeneralTracker, str]:
    for module in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[module]  # it reads TRACKIO_DIR only when it is imported
    import trackio
    from accelerate.tracking import TrackioTracker

    class Tracker(TrackioTracker):
        def finish(self) -> None:
            trackio.finish()  # unlike the method of its run, this keeps trackio from finishing it again at exit

    tracker = Tracker(PROJECT, name=run.path.name, resume="allow" if earlier else "never")
    tracker.start()
    return tracker, run.path.name


#: Starts a tracker: from the run, the id of the tracker's run to continue, and the step; with the id it now has.
_STARTS: dict[str, Callable[[Run, str | None, int], tuple[GeneralTracker, str]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def _mlflow_variables(run: Run) -> dict[str, str]:
    folder = run.path.absolute() / "mlruns"
    local = {"MLFLOW_TRACKING_URI": folder.as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    shared = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": MLFLOW_RETRIES, "MLFLOW_DISABLE_TELEMETRY": "true"}
    return shared if "MLFLOW_TRACKING_URI" in os.environ else {**shared, **local}


#: Environment variables that a library reads while it tracks.
_VARIABLES: dict[str, Callable[[Run], dict[str, str]]] = {
    "wandb": lambda run: {
        "WANDB_CACHE_DIR": str(run.path.absolute() / "wandb" / "cache"),
        "WANDB_INIT_TIMEOUT": WANDB_INIT_TIMEOUT,
    },
    "mlflow": _mlflow_variables,
    "trackio": lambda run: {"TRACKIO_DIR": str(run.path.absolute() / "trackio")},
}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside, the environment has these variables too, where the user has not set them."""
    added = {key: value for key, value in variables.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Restore the state of the global generators afterwards; trackio, for one, draws from Python's."""
    import numpy
    import torch

    python, array, tensor = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)
        torch.set_rng_state(tensor)


def _flat(value: Any, separator: str, key: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values in nested mappings and lists, each with its joined keys."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(inner, separator, f"{key}{separator}{name}" if key else str(name))
    else:
        yield key, value
