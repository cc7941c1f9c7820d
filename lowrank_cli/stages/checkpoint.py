"""Checkpoints that a killed run continues from, bit for bit: safetensors and JSON in one atomically placed folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_cli.adapter import ranks, state
from lowrank_cli.adapter.core import Adapter
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import AfterStep, Method
from lowrank_cli.runs import Run, atomic_folder, read_json

STATE = "state.json"


def save(
    run: Run,
    accelerator: Accelerator,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    method: Method,
    progress: dict[str, Any],
) -> None:
    """Write ``checkpoints/step-N`` (N = ``progress["step"]``) and drop the older ones; every process calls this."""
    rng = gather_object([_rng()])
    if not accelerator.is_main_process:
        return
    final = run.file(f"checkpoints/step-{progress['step']:07d}")
    groups = {
        "trained": state.tensors(adapter),
        "optimizer": state.moments(optimizer),
        "method": method.state() if isinstance(method, AfterStep) else {},
        "rng": {f"{rank}.{key}": value for rank, states in enumerate(rng) for key, value in states.items()},
    }
    with atomic_folder(final) as folder:
        for name, tensors in groups.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
        hashes = {f"{name}.safetensors": state.sha256(folder / f"{name}.safetensors") for name in groups}
        (folder / STATE).write_text(
            json.dumps({**progress, "ranks": adapter.ranks(), "files": hashes}, indent=2) + "\n"
        )
    for older in final.parent.glob("step-*"):
        if older != final:
            shutil.rmtree(older, ignore_errors=True)


def newest(run: Run) -> Path | None:
    """The latest checkpoint of a run."""
    return max((path.parent for path in run.path.glob(f"checkpoints/step-*/{STATE}")), default=None)


def load(
    folder: Path, accelerator: Accelerator, adapter: Adapter, optimizer: torch.optim.Optimizer, method: Method
) -> dict[str, Any]:
    """Put everything back as :func:`save` found it and return ``progress``; UserError where a file was altered."""
    progress = read_json(folder / STATE)
    for name, expected in progress.pop("files").items():
        if state.sha256(folder / name) != expected:
            raise UserError(f"{folder / name} was truncated or altered (its SHA-256 is not the one saved with it)")
    ranks.rebuild(adapter, progress.pop("ranks"), str(folder), optimizer)
    state.assign(adapter, load_file(folder / "trained.safetensors"), str(folder))
    state.load_moments(optimizer, load_file(folder / "optimizer.safetensors"))
    if isinstance(method, AfterStep):
        method.load_state(adapter, load_file(folder / "method.safetensors"))
    _restore_rng(load_file(folder / "rng.safetensors"), accelerator.process_index)
    return progress


def _rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(states: dict[str, Tensor], rank: int) -> None:
    torch.set_rng_state(states[f"{rank}.cpu"])
    if f"{rank}.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])
