"""The entries of ``bench.methods``: whose each one is, and which can be measured on this machine."""

from __future__ import annotations

import importlib.util

from lowrank_cli.runs import progress
from lowrank_cli.schema import PEFTS, VLLM, VLLM_LORA, BenchRun, MethodConfig


def is_peft(entry: str) -> bool:
    """Whether an entry of ``bench.methods`` is the PEFT library's."""
    return entry.split()[0] in PEFTS


def is_vllm(entry: str) -> bool:
    """Whether an entry of ``bench.methods`` is vLLM's."""
    return entry.split()[0] in (VLLM, VLLM_LORA)


def missing_requirement(entry: str, config: BenchRun) -> str | None:
    """What an entry of ``bench.methods`` needs and this machine lacks, or None."""
    if is_vllm(entry) and getattr(config.bench, "vllm", None) is None:
        return "bench.vllm does not name a Python that has vLLM"
    package = PEFTS.get(entry.split()[0])
    if package and importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    return "Liger's kernels need a GPU" if package == "liger_kernel" and config.hardware.device == "cpu" else None


def available_methods(config: BenchRun) -> dict[str, MethodConfig | None]:
    """The entries of ``bench.methods`` that can be measured here. Prints which are skipped, and why."""
    variants = dict(config.variants)
    for entry in config.variants:
        if reason := missing_requirement(entry, config):
            progress.console().print(f"'{entry}' is skipped: {reason}")
            del variants[entry]
    return variants
