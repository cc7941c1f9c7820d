"""The memory that a device has in use, its peak, and waiting until a device has finished its work."""

from __future__ import annotations

import torch

from lowrank_cli.runs.process import peak_memory_bytes, reset_peak_memory, resident_bytes


def synchronized(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held_memory(device: torch.device) -> int:
    """Bytes in use now: allocated on a GPU, resident in the process otherwise."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of :func:`peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak_memory()


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes since :func:`reset_peak`: allocated on a GPU, resident in the process otherwise."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def memory_meaning(device: torch.device, of: str) -> str:
    """A description of the peak memory in a benchmark's rows; ``of`` names the measured operation."""
    what = "largest allocation on the device" if device.type == "cuda" else "largest resident size of the process"
    return f"{what} during a {of}, without the other methods' adapters"
