"""Where the time of the server's engine goes: reading prompts, letting them join, and a decoding step.

    python scripts/research/serve_profile.py bench=serve model=smollm2_135m hardware.threads=1 "bench.tenants=[1,8]"

Takes the overrides of ``lrk bench``. As many prompts as ``bench.max_rows`` are read together, and then answered; each
row asks the next tenant. Printed are ms of the thread's processor time, the median of ``bench.rounds`` such batches.
Entries and numbers of tenants are measured in turn, after a warm-up. HTTP is not part of it.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.adapter.tenants.batch import Batch
from lowrank_cli.adapter.tenants.grouped_update import GroupedUpdate
from lowrank_cli.adapter.tenants.row_updates import RowUpdates
from lowrank_cli.adapter.tenants.tenant import Routes
from lowrank_cli.bench.base_model import load_base
from lowrank_cli.bench.bench_models import adapted_copy, different
from lowrank_cli.config.composition import compose
from lowrank_cli.launch.stage import create
from lowrank_cli.models.prepack import PrepackedLinear
from lowrank_cli.schema import BASE
from lowrank_cli.serving.kv_rows import KVRows, RowLayer
from lowrank_cli.serving.lanes import BankLane
from lowrank_cli.serving.requests import Model, Request
from lowrank_cli.serving.sampling import Sampling

#: What is timed inside a stage: a name and the functions.
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "linears": ((PrepackedLinear, "forward"),),
    "adapters": ((GroupedUpdate, "add_to"), (RowUpdates, "add_to")),
    "routers": ((Routes, "gates"),),
    "operands": ((Batch, "_set"),),
    "cache": ((RowLayer, "update"), (KVRows, "join"), (KVRows, "inputs"), (KVRows, "keep")),
    "tokens": ((BankLane, "_extend"),),
}
STAGES = ("read", "join", "first step", "step")  #: the first step gathers the operands of the rows


@contextmanager
def timed(spent: Counter[str]) -> Iterator[None]:
    """Inside, every call of PARTS adds its time in ms to ``spent``."""

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += 1000 * (time.thread_time() - began)  # type: ignore[assignment]  # a Counter of floats

        return call

    originals = [(owner, at, name, getattr(owner, at)) for name, all_of in PARTS.items() for owner, at in all_of]
    for owner, at, name, function in originals:
        setattr(owner, at, wrapped(name, function))
    try:
        yield
    finally:
        for owner, at, _, function in originals:
            setattr(owner, at, function)


def batch(
    lane: BankLane, adapters: list[str | None], prompts: list[list[int]], new: int, spent: Counter[str]
) -> dict[str, dict[str, float]]:
    """The parts of each stage, in ms, while ``prompts`` are answered; ``whole`` is the stage itself."""
    stages: dict[str, dict[str, float]] = {}

    def stage(name: str, work: Callable[[], Any], times: int = 1) -> Any:
        spent.clear()
        began = time.thread_time()
        for _ in range(times):
            result = work()
        whole = 1000 * (time.thread_time() - began)
        stages[name] = {key: value / times for key, value in {"whole": whole, **spent}.items()}
        return result

    requests = [
        Request(Model("any", adapter), prompt, Sampling(new), lambda news: None)
        for adapter, prompt in zip(adapters, prompts, strict=True)
    ]
    read = stage("read", lambda: lane.read(requests))
    stage("join", lambda: lane.join(requests, read))
    stage("first step", lane.step)
    stage("step", lane.step, new - 3)
    lane.step()
    assert not lane.answers
    return stages


def main() -> None:
    composed = compose("bench", sys.argv[1:], None)
    config, run = composed.config, create(composed, None, "")
    bench, base = config.bench, load_base(config, run, generates=True)
    draw = random.Random(config.seed)
    prompts = [[draw.randrange(10, base.vocabulary) for _ in range(bench.prompt_length)] for _ in range(bench.max_rows)]
    bank = Bank(base.model)
    cells: dict[tuple[str, int], tuple[BankLane, list[str | None]]] = {}
    for entry, variant in config.variants.items():
        if variant is not None:
            adapter = adapted_copy(base.model, entry, variant, config.seed).adapter
            assert adapter is not None
            for number in different(adapter, max(bench.tenants)):
                bank.add(f"{entry} {number}", adapter)
        for tenants in bench.tenants if entry != BASE else [1]:
            names = [None if entry == BASE else f"{entry} {row % tenants}" for row in range(bench.max_rows)]
            cells[entry, tenants] = BankLane(bank, base.tokenizer, False), names
    samples: dict[tuple[str, int], list[dict[str, dict[str, float]]]] = {cell: [] for cell in cells}
    spent: Counter[str] = Counter()
    with timed(spent):
        for number in range(bench.rounds + 1):
            for cell, (lane, names) in cells.items():
                sample = batch(lane, names, prompts, bench.new_tokens, spent)
                samples[cell] += [sample] if number else []
    print("| | tenants | stage | whole |", " | ".join(PARTS), "|")
    for (entry, tenants), all_of in samples.items():
        for name in STAGES:
            medians = [statistics.median(one[name].get(key, 0.0) for one in all_of) for key in ("whole", *PARTS)]
            print(f"| {entry} | {tenants} | {name} |", " | ".join(f"{value:.1f}" for value in medians), "|")


if __name__ == "__main__":
    main()
