"""Checkpoints from which a killed run resumes bit for bit: a folder of safetensors and JSON, written atomically."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowrank_cli.adapter import ranks
from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files import optimizer_state, save_load
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import AfterStep, Method
from lowrank_cli.reader import Count, Finite, Sha256, Where, read_json
from lowrank_cli.runs import Run, atomic_folder
from lowrank_cli.session.processes import Processes

STATE = "state.json"
GROUPS = ("trained", "optimizer", "method", "rng")  #: one safetensors file each


class State(TypedDict):
    """``state.json``."""

    step: Count
    best_step: int | None
    best_loss: float | None
    stale: Count
    seconds: Finite
    tokens: Count
    pending: list[float]
    ranks: dict[str, Count]
    files: Annotated[
        dict[str, Sha256],
        Where(
            lambda files: files.keys() == {f"{name}.safetensors" for name in GROUPS},
            f"the hashes of {', '.join(GROUPS)}",
        ),
    ]
    sha256: NotRequired[Sha256]  #: of the other keys; older checkpoints lack it


def save(
    run: Run,
    accelerator: Processes,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    method: Method,
    progress: dict[str, Any],
) -> None:
    """Write ``checkpoints/step-N`` (N = ``progress["step"]``) and delete older ones. Every process must call this."""
    rng = accelerator.gather_object([_rng()])
    if not accelerator.is_main_process:
        return
    final = run.file(f"checkpoints/step-{progress['step']:07d}")
    groups = {
        "trained": save_load.tensors(adapter),
        "optimizer": optimizer_state.moments(optimizer),
        "method": method.state() if isinstance(method, AfterStep) else {},
        "rng": {f"{rank}.{key}": value for rank, states in enumerate(rng) for key, value in states.items()},
    }
    with atomic_folder(final) as folder:
        for name, tensors in groups.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
        hashes = {f"{name}.safetensors": save_load.sha256(folder / f"{name}.safetensors") for name in groups}
        record = {**progress, "ranks": adapter.ranks(), "files": hashes}
        (folder / STATE).write_text(json.dumps({**record, "sha256": record_hash(record)}, indent=2) + "\n")
    for older in final.parent.glob("step-*"):
        if older != final:
            shutil.rmtree(older, ignore_errors=True)


def newest(run: Run) -> Path | None:
    """The latest checkpoint of a run, complete or not."""
    return max(run.path.glob("checkpoints/step-*"), default=None)


def load(
    folder: Path, accelerator: Processes, adapter: Adapter, optimizer: torch.optim.Optimizer, method: Method
) -> dict[str, Any]:
    """Restore everything that :func:`save` wrote and return ``progress``.

    Raises:
        UserError: a file is missing or altered, or its tensors do not fit this run.
    """
    progress = read_json(folder / STATE, State)
    if progress.pop("sha256", None) not in (None, record_hash(progress)):
        raise UserError(f"{folder}: {STATE} was altered (its SHA-256 is not the one saved with it)")
    save_load.check_files(folder, progress.pop("files"))
    ranks.rebuild(adapter, progress.pop("ranks"), str(folder), optimizer)
    save_load.assign(adapter, save_load.read_tensors(folder / "trained.safetensors"), str(folder))
    moments = folder / "optimizer.safetensors"
    optimizer_state.load_moments(optimizer, save_load.read_tensors(moments), str(moments))
    if isinstance(method, AfterStep):
        state = folder / "method.safetensors"
        try:
            method.load_state(adapter, save_load.read_tensors(state))
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{state}: not the state of method={method.config.name} ({error})") from error
    _restore_rng(folder / "rng.safetensors", accelerator.process_index)
    return progress


def record_hash(record: dict[str, Any]) -> str:
    """SHA-256 of ``state.json`` without its key ``sha256``."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(file: Path, rank: int) -> None:
    """Restore the random generators of process ``rank``; one that did not exist draws other numbers than the first."""
    states = save_load.read_tensors(file, "0.cpu")
    saved = rank if f"{rank}.cpu" in states else 0
    try:
        torch.set_rng_state(states[f"{saved}.cpu"])
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{file}: '{saved}.cpu' is not the state of a random generator ({error})") from error
    if f"{saved}.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{saved}.cuda"])
    if saved != rank:
        torch.manual_seed(rank + int(torch.randint(2**31, ())))
