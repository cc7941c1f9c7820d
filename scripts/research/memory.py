"""The memory that `lrk check --memory` estimates for a training step, against what a process takes.

    python scripts/research/memory.py --output memory.json CASE…

A case is `ROWS:OVERRIDES`, for example `"16:method=lora model.path=FOLDER"`. Each runs in a process of its own: two
steps on the training batch with the longest examples. Measured is the growth of its resident memory from before the
model was loaded, without the tokenizer (256 MiB for Gemma 3). glibc is told to return freed blocks at once
(MALLOC_MMAP_THRESHOLD_); else its heap keeps some.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

THRESHOLD = 1 << 16  # bytes from which a block is memory of its own
WARM = ["method=lora", "train.batch_size=2", "task.limit=64", "hardware.threads=1"]


def measured(overrides: list[str], folder: str) -> dict[str, int]:
    """Bytes of a step of the run ``overrides``, and what was estimated for it."""
    from lowrank_cli.config.composition import compose
    from lowrank_cli.launch.stage import create
    from lowrank_cli.models.outline import outline_tokenizer
    from lowrank_cli.runs import progress
    from lowrank_cli.runs.process import peak_memory_bytes, reset_peak_memory, resident_bytes
    from lowrank_cli.session.ledger import counting
    from lowrank_cli.session.memory import Length, TrainingStep
    from lowrank_cli.session.session import start
    from lowrank_cli.stages.train import Trainer

    def steps(overrides: list[str]) -> tuple[Length, int]:
        composed = compose("train", [*overrides, f"outputs={folder}"], None)
        run = create(composed, None, "")
        trainer = Trainer(start(composed.config), run)
        data = trainer.train_data
        full = map(trainer.batches.__getitem__, range(len(data) // composed.config.train.batch_size))
        tokens = [max(len(data[row].input_ids) for row in batch) for batch in full]
        longest = tokens.index(max(tokens))
        with progress.bar("", 2, shown=False) as trainer.bar:
            for _ in range(2):
                trainer.take_step(longest + 1)
        rows = [data[j] for j in trainer.batches[longest]]
        length = Length(max(len(row.input_ids) for row in rows), sum(row.answered for row in rows) // len(rows), "")
        return length, len(rows)

    steps(WARM)
    config = compose("train", overrides, None).config
    before = resident_bytes()
    tokenizer = outline_tokenizer(config.model)  # kept until the end, so that the next one takes as much again
    before_model = resident_bytes()
    reset_peak_memory()
    length, rows = steps(overrides)
    growth = peak_memory_bytes() - before_model - (before_model - before)
    assert tokenizer is not None
    with counting() as ledger:
        memory = TrainingStep(config, length, ledger).memory(rows)
    return {"rows": rows, "tokens": length.tokens, "measured": growth, "estimated": memory.peak, **vars(memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="ROWS:OVERRIDES")
    parser.add_argument("--output", type=Path, default=Path("memory.json"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measured(args.cases, folder)))
        return
    results = []
    for case in args.cases:
        rows, _, overrides = case.partition(":")
        words = [*shlex.split(overrides), f"train.batch_size={rows}", "task.limit=256", "hardware.threads=1"]
        command = [sys.executable, __file__, "--child", *words]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(THRESHOLD)}
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        result = {"case": overrides, **json.loads(output.splitlines()[-1])}
        results.append(result)
        ratio = result["estimated"] / result["measured"]
        sizes = f"{result['estimated'] / 2**20:.0f} of {result['measured'] / 2**20:.0f} MiB"
        print(f"{overrides}: {result['rows']} × {result['tokens']}: {sizes} ({ratio:.2f})", flush=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
