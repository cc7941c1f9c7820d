"""``lrk bench``: one kind of measurement, in interleaved rounds on one set of frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from lowrank_cli.bench import decode, icl, load, prepack, score, serve, train_loop, train_step
from lowrank_cli.runs import Run
from lowrank_cli.schema import BenchRun


class Kind(Protocol):
    """What a module of ``lowrank_cli/bench`` does for one value of ``bench.measure``."""

    def measure(self, config: BenchRun, run: Run) -> dict[str, Any]:
        """What ``bench.json`` holds of this kind: ``rows``, and anything beside them."""
        ...

    def metrics(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Flat numbers of ``bench.json``, ``bench/…``."""
        ...

    def figures(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Plots of ``bench.json``, as ``report/plots.py`` draws them."""
        ...


KINDS: dict[str, Kind] = {
    "decode": decode,
    "train": train_step,
    "loop": train_loop,
    "score": score,
    "icl": icl,
    "load": load,
    "prepack": prepack,
    "serve": serve,
}


def run(config: BenchRun, run: Run, adapter_run: Path | None, *, resume: bool = False) -> dict[str, float]:
    """Measure, and write ``bench.json`` and ``figures.json``. Resumed, it starts again."""
    kind, hardware = KINDS[config.bench.measure], config.hardware
    measured = kind.measure(config, run)
    if hardware.device == "cuda":
        peaks = [row["peak_memory_bytes"] for row in measured["rows"] if "peak_memory_bytes" in row]
        memory = max(peaks, default=torch.cuda.max_memory_allocated())
        run.update(device=torch.cuda.get_device_name(), device_memory_bytes=memory)
    record = {
        **{key: run.info[key] for key in ("command", "git", "device", "packages", "python", "platform")},
        "precision": hardware.precision,
        "quantization": hardware.quantization,
        "prepack": hardware.prepack,
        "threads": torch.get_num_threads(),
        "bench": vars(config.bench),
        "variants": run.config()["variants"],
        **measured,
    }
    run.write_json("bench.json", record)
    run.write_json("figures.json", kind.figures(record))
    return kind.metrics(record)
