"""What train.packing saves: CPU time of training passes over the same examples, packed and padded.

    python scripts/research/packing.py method=lora model.path=FOLDER task=gsm8k task.limit=64 train.batch_size=8

One epoch of forward and backward passes in three layouts, batch by batch in turn: padded batches of similar lengths (as
one task is trained), padded random draws (as a mix is trained) and packed random draws.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

from lowrank_cli.adapter.training.packing import pack
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.config.composition import compose
from lowrank_cli.session.session import start
from lowrank_cli.tasks.batches import WINDOW, Batches, padding


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = compose("train", [*sys.argv[1:], f"outputs={folder}", "train.packing=true"], None).config
        session = start(config)
    assert session.adapter is not None
    with session.adapter.disabled():
        pack(session.model)
    recompute(session.model.train(), config.hardware.gradient_checkpointing)
    data, size = session.encode(session.task.train), config.train.batch_size
    lengths = [len(row.input_ids) for row in data]
    alike, drawn = (Batches(lengths, size, config.seed, window) for window in (WINDOW, 1))
    layouts = {
        "padded, similar lengths": (alike, session.batch, padding(lengths, alike, len(alike), 1, 1)),
        "padded, random draws": (drawn, session.batch, padding(lengths, drawn, len(drawn), 1, 1)),
        "packed, random draws": (drawn, session.packed, 0.0),
    }
    seconds = dict.fromkeys(layouts, 0.0)
    for step in range(-1, len(alike)):  # the first time to warm up
        for name, (batches, collate, _) in layouts.items():
            began = time.process_time()
            session.loss_sum(session.model, collate([data[row] for row in batches[max(step, 0)]])).backward()
            session.model.zero_grad()
            seconds[name] += (time.process_time() - began) * (step >= 0)
    print(f"{len(data)} examples of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all; {size} a batch")
    for name, (_, _, share) in layouts.items():
        print(
            json.dumps(
                {
                    "layout": name,
                    "padding": round(share, 3),
                    "seconds_per_example": round(seconds[name] / len(data), 4),
                    "tokens_per_second": round(sum(lengths) / seconds[name]),
                }
            )
        )


if __name__ == "__main__":
    main()
