"""The device and the CPU threads of this process."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict

import torch
from accelerate.state import AcceleratorState
from rich.text import Text
from transformers import PreTrainedModel

from lowrank_cli.adapter.image_input import input_width
from lowrank_cli.adapter.tenants.update_class import require_grouped
from lowrank_cli.adapter.training.compiled import require_compiler
from lowrank_cli.errors import UserError
from lowrank_cli.models.prepack import multiplier
from lowrank_cli.models.quantize import require_quantization
from lowrank_cli.runs import Run, progress
from lowrank_cli.runs.threads import Threads, available_cores, choose
from lowrank_cli.schema import HardwareConfig
from lowrank_cli.session.processes import Processes


def prepare(hardware: HardwareConfig) -> Processes:
    """Set up the device and the CPU threads of this process.

    There are ``hardware.threads`` threads, or one for each core until :func:`greet` knows the width of the model.

    Raises:
        UserError: the device or a library it needs is not available.
    """
    torch.set_num_threads(hardware.threads or available_cores().count)
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device: cuda is asked for, but no CUDA device is visible (use hardware=cpu)")
    if hardware.device == "cuda" and hardware.processes > torch.cuda.device_count():
        raise UserError(
            f"hardware.processes: {hardware.processes} are asked for, but {torch.cuda.device_count()} CUDA devices "
            f"are visible"
        )
    if hardware.compile:
        require_compiler(hardware.device)
    require_quantization(hardware.quantization)
    require_grouped(hardware.grouped)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    AcceleratorState._reset_state(reset_partial_state=world == 1)  # it outlives a run; the next may differ
    accelerator = Processes(cpu=hardware.device == "cpu")
    if hardware.device == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    assert accelerator.num_processes == world == hardware.world, "processes must be started by torchrun"
    return accelerator


def greet(
    run: Run,
    hardware: HardwareConfig,
    model: PreTrainedModel,
    header: str,
    *,
    packing: str = "",
    source: str = "",
    notes: Iterable[str] = (),
) -> None:
    """Choose the CPU threads for ``model``, record what computes it in run.json, and print the run's first lines.

    A resumed run keeps the number of threads it began with, which decides how sums are rounded.

    Args:
        header: which model this is.
        packing: whether weights are packed and why; empty to print nothing.
        source: which earlier run is used; empty to print nothing.
        notes: what was chosen for the user, a line each.
    """
    run.update(attention=model.config._attn_implementation, packed_weights=multiplier(model))
    lines = [Text(header)]
    if source:
        lines.append(Text(source))
    lines += map(Text, notes)
    if hardware.device == "cpu":
        before = run.info.get("threads")
        threads = choose(hardware.threads, input_width(model))
        threads = threads if before is None else Threads(before["count"], before["reason"])
        torch.set_num_threads(threads.count)
        run.update(threads=asdict(threads))
        if threads.count != hardware.threads:
            lines.append(Text(str(threads), style="dim"))
    if packing:
        lines.append(Text(packing, style="dim"))
    if run.writes:
        progress.console().print(*lines, sep="\n", soft_wrap=True)
