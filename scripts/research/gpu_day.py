"""What one GPU shows in ten minutes: the CUDA tests, and training and decoding at 7B, in bf16 and in 4 bits.

    python scripts/research/gpu_day.py                      # writes outputs/gpu_day
    python scripts/research/gpu_day.py --dry                # the same in miniature, on a CPU

Needs triton, bitsandbytes and peft for all of it, and 14 GB of disk for a random checkpoint, which it deletes again.
Each part is a process of its own with its own time limit; ``results.json`` and the plots are written after each, so a
run that is cut off keeps what it has. ``PART.log`` is what a part printed, ``runs/`` holds the folders of the benches.
Compare the ratios with docs/explanation/cost.md, which was written without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowrank_cli.models.load import BUNDLED
from lowrank_cli.report import plots
from lowrank_cli.runs import all_runs, atomic_write
from lowrank_cli.runs.provenance import git_state, package_versions

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 10
SHORTEST = 10  #: seconds; a part is not started with less time left
SHARED = ["base", "lora", "milora k=3"]  #: entries of bench.methods that can share a batch, by our kernels
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    command: list[str]
    limit: float  #: seconds
    missing: str = ""  #: why it is not run


@dataclass
class Result:
    """What came of a part."""

    name: str
    command: list[str]
    status: str  #: ``done``, ``failed``, ``timed out`` or ``skipped``
    seconds: float
    note: str = ""
    bench: dict[str, Any] | None = None  #: bench.json


def parts(folder: Path, dry: bool) -> list[Part]:
    """All parts, what matters most first.

    Args:
        folder: results go there.
        dry: a small model on a CPU.
    """
    shape = "2x64x96x4" if dry else "7b"
    hardware = ["hardware=cpu", "hardware.threads=1"] if dry else ["hardware=gpu"]
    rank = "bench.rank=4" if dry else "bench.rank=16"
    step = (
        ["bench.batch_size=2", "bench.prompt_length=16"] if dry else ["bench.batch_size=4", "bench.prompt_length=512"]
    )
    length = (
        ["bench.prompt_length=8", "bench.new_tokens=3"] if dry else ["bench.prompt_length=64", "bench.new_tokens=24"]
    )
    many = ["bench.tenants=[1,2,4]", "bench.batch_size=4"] if dry else ["bench.tenants=[1,8,64]", "bench.batch_size=64"]
    entries = measured("base", "lora", "dora", "milora k=3", f"fanlora setting={folder / 'kept.yaml'}", "peft")
    greedy = [entries, "bench.beams=[1]", "bench.batch_size=1"]
    drawn, saved = [f"model.shape={shape}"], [f"model.path={folder / 'checkpoint'}"]
    quantized = hardware if dry else ["hardware=gpu_4bit"]

    def bench(name: str, kind: str, limit: float, *words: list[str], missing: str = "") -> Part:
        rounds = 1 if dry else 3 if kind == "train" else 2
        common = [rank, f"bench.rounds={rounds}", f"outputs={folder / 'runs' / name}"]
        overrides = [word for of in (*words, common) for word in of]
        return Part(name, lrk("bench", kind, *overrides), limit, missing)

    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_gpu.py")]
    save = [__file__, "--save", shape, "cpu" if dry else "gpu", str(folder / "checkpoint")]
    triton = ["hardware.grouped=triton"]
    return [
        Part("tests", [sys.executable, *tests], 120),
        bench("train_bf16", "train", 90, drawn, hardware, [entries], step),
        bench("decode_bf16", "decode", 90, drawn, hardware, greedy, length),
        bench("tenants_torch", "tenants", 130, drawn, hardware, [measured(*SHARED, "peft")], length, many),
        bench(
            "tenants_triton",
            "tenants",
            80,
            drawn,
            hardware,
            [measured(*SHARED)],
            length,
            many,
            *([] if dry else [triton]),
            missing="hardware.grouped=triton needs CUDA" if dry else "",
        ),
        Part("checkpoint", [sys.executable, *save], 90),
        bench("train_4bit", "train", 90, saved, quantized, [entries], step),
        bench("decode_4bit", "decode", 90, saved, quantized, greedy, length),
    ]


def measured(*entries: str) -> str:
    """The override of ``bench.methods``."""
    quoted = ",".join(f"'{entry}'" for entry in entries)
    return f"bench.methods=[{quoted}]"


def lrk(*words: str) -> list[str]:
    return [sys.executable, "-m", "lowrank_cli", *words]


def measure(all_parts: Sequence[Part], folder: Path, seconds: float) -> list[Result]:
    """Run the parts one after the other within ``seconds``; write results and plots after each."""
    ends, results = time.monotonic() + seconds, list[Result]()
    for part in all_parts:
        left = ends - time.monotonic()
        if part.missing or left < min(SHORTEST, part.limit):
            result = Result(part.name, part.command, "skipped", 0, part.missing or "no time left")
        else:
            result = run(part, folder, min(part.limit, left))
        results.append(result)
        print(f"{result.name}: {result.status}, {result.seconds:.0f} s {result.note}", flush=True)
        record = {"git": git_state(), "packages": package_versions(), "parts": [asdict(result) for result in results]}
        atomic_write(folder / "results.json", json.dumps(record, indent=1).encode())
        for figure in figures(results):
            plots.write(plots.picture(figure), folder / figure["file"])
    return results


def run(part: Part, folder: Path, limit: float) -> Result:
    """Run one part for at most ``limit`` seconds."""
    began = time.monotonic()
    log = folder / f"{part.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            status = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "timed out"
    runs = [each for each in all_runs(folder / "runs" / part.name) if (each.path / "bench.json").is_file()]
    lines = log.read_text(errors="replace").strip().splitlines()
    note = "" if runs and status == "done" else lines[-1] if lines else ""
    bench = runs[0].read_json("bench.json") if runs else None
    return Result(part.name, part.command, status, time.monotonic() - began, note, bench)


def figures(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Plots of what is there: steps against the frozen model's in each precision, and tenants by implementation."""
    benches = {result.name: result.bench for result in results if result.bench}
    steps = {name: bench for name, bench in benches.items() if not name.startswith("tenants")}
    shared = {name: bench for name, bench in benches.items() if name.startswith("tenants")}
    return [*([_steps(steps)] if steps else []), *([_tenants(shared)] if shared else [])]


def _steps(benches: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Bars; the quartiles are those of training."""
    rows: dict[str, dict[str, list[float]]] = {}
    for name, bench in benches.items():
        for row in bench["rows"][1:]:
            quartiles = row.get("step_ratio_quartiles", [math.nan, math.nan])
            rows.setdefault(row["method"].split(" setting")[0], {})[name] = [row["step_ratio"], *quartiles]
    empty = [math.nan] * 3
    values, low, high = ([[of.get(name, empty)[at] for name in benches] for of in rows.values()] for at in range(3))
    kinds = {"train": "training", "decode": "decoding"}
    first = next(iter(benches.values()))
    return {
        "kind": "bars",
        "file": "steps.png",
        "title": f"A step against the frozen model's own ({first['device']}, {first['model']})",
        "label": "× base (median)",
        "rows": list(rows),
        "columns": [
            f"{kinds[name.split('_')[0]]}, {bench['quantization'] or bench['precision']}"
            for name, bench in benches.items()
        ],
        "values": values,
        "low": low,
        "high": high,
    }


def _tenants(benches: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Lines over the number of adapters."""
    lines: dict[str, list[float]] = {}
    for name, bench in benches.items():
        for row in bench["rows"]:
            if row["tenants"]:
                lines.setdefault(f"{row['method']}, {name.split('_')[1]}", []).append(row["ms_per_token"])
    first = next(iter(benches.values()))
    return {
        "kind": "lines",
        "file": "tenants.png",
        "title": f"A decoding step of {first['bench']['batch_size']} rows that share the model ({first['device']})",
        "label": "ms (median)",
        "column_label": "adapters in the batch",
        "rows": list(lines),
        "columns": first["bench"]["tenants"],
        "values": list(lines.values()),
    }


def save(shape: str, hardware: str, folder: Path) -> None:
    """Write a checkpoint of random weights, as 4 bits are made of weights that are read."""
    import torch

    from lowrank_cli.config.composition import compose
    from lowrank_cli.models.shape import random_model

    config = compose("bench", ["bench=train", f"model.shape={shape}", f"hardware={hardware}"], None).config
    torch.manual_seed(0)
    model, _ = random_model(config.model, config.hardware, config.hardware.device)
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(BUNDLED / name, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_day"), help="folder of results")
    parser.add_argument("--dry", action="store_true", help="a small model on a CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--save", nargs=3, metavar=("SHAPE", "HARDWARE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.save:
        save(*args.save[:2], Path(args.save[2]))
        return
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kept.yaml").write_text("layers: {all: [V, D]}\n")
    try:
        results = measure(parts(folder, args.dry), folder, 60 * args.minutes)
    finally:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    sys.exit(any(result.status in ("failed", "timed out") for result in results))


if __name__ == "__main__":
    main()
