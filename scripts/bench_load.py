"""How long it takes to load one more adapter while others are served, beside the PEFT library.

    python scripts/bench_load.py --out docs/results/bench_load.json

LoRA r = 16 on all roles of a Llama with random weights (`model.shape=100m`), fp32. Measured in turn, round after round:
reading the file's tensors alone; our bank's load (hashes of all files, the model's fingerprint, shapes), then its check
that the adapter repeats the logits it was saved with; the library's ``load_adapter``, which checks nothing of this. The
adapter is removed again each time. Figures are medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file

from lowrank_cli import methods
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.module_copy import copied
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.config.composition import compose
from lowrank_cli.models.shape import random_model
from lowrank_cli.runs.provenance import cpu_name, git_state, package_versions


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["model.shape=100m"], help="as for lrk train")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", FutureWarning)  # the library's own use of Transformers
    config = compose("bench", args.overrides).config
    base = random_model(config.model, config.hardware, torch.device("cpu"))[0].requires_grad_(False)
    method = methods.create(compose("train", ["method=lora", "method.rank=16"]).config.method)
    adapter = method.adapt(copied(base))
    for parameter in adapter.trained.values():
        parameter.data.normal_(std=0.02)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_load.save(adapter, folder, {})
        bank = Bank(copied(base))
        served = peft.PeftModel.from_pretrained(copied(base), folder, adapter_name="first")
        bank.load("first", folder)
        work: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {  # what is timed, and what undoes it
            "reading the file": (lambda: load_file(folder / save_load.WEIGHTS), lambda: None),
            "load": (lambda: bank.load("second", folder), lambda: None),
            "check": (lambda: bank.check(["second"]), lambda: bank.remove("second")),
            "peft": (lambda: served.load_adapter(folder, "second"), lambda: served.delete_adapter("second")),
        }
        times: dict[str, list[float]] = {entry: [] for entry in work}
        for _ in range(args.rounds + 1):
            for entry, (timed, undo) in work.items():
                times[entry].append(milliseconds(timed))
                undo()
        size = (folder / save_load.WEIGHTS).stat().st_size
    record = {
        "command": " ".join(["python scripts/bench_load.py", *args.overrides]),
        "git": git_state(),
        "machine": cpu_name(),
        "threads": args.threads,
        "packages": package_versions(),
        "bytes": size,
        "milliseconds": {entry: statistics.median(own[1:]) for entry, own in times.items()},  # the first warms up
        "all_milliseconds": times,
    }
    for entry, own in record["milliseconds"].items():
        print(f"{entry:18} {own:7.1f} ms")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
