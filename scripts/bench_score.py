"""What exact AB-LoRA scores cost: the engine against two passes for each rank, in one process, in turn.

    python scripts/bench_score.py --model llama --out docs/results/bench_score_llama.json
    python scripts/bench_score.py --model 100m --sample 12 --out docs/results/bench_score_100m.json

The naive loop gates ranks one after the other and runs the whole padded batch each time; of its 2 · ranks passes,
``--sample`` evenly spaced ones are timed in each round and their mean is taken for all. The engine runs whole. The
batch is dev examples of a generated task, as ``lrk score`` takes them. Also: the ratio of their floating-point
operations in matrix products, which is what a machine without other costs would gain; the largest difference between
the two, and how the cheap scores rank the ranks (Spearman's correlation with the exact ones).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lowrank_cli import tasks
from lowrank_cli.adapter.adapted_model import Adapter, inject
from lowrank_cli.adapter.target_sites import find_sites
from lowrank_cli.config.composition import compose
from lowrank_cli.models.load import BUNDLED
from lowrank_cli.runs.provenance import cpu_name, package_versions
from lowrank_cli.schema import SCORE_KINDS
from lowrank_cli.scoring.ablation import ranks_of
from lowrank_cli.scoring.kinds import score
from lowrank_cli.scoring.probe import IGNORED, Batch, Probe
from lowrank_cli.tasks import encode

#: Llama shapes with random weights, for speed only.
SHAPES = {"100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}}


def adapted(name: str, rank: int, device: str) -> Adapter:
    """The model with an adapter in which every rank does something."""
    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM.from_pretrained(BUNDLED)
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SHAPES[name]))
    adapter = inject(model.to(device).eval(), find_sites(model, ["all"]), rank=rank, alpha=2 * rank, dropout=0.0)
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_b.normal_(std=0.02 / rank)
    return adapter


def train(adapter: Adapter, batches: list[Batch], rate: float = 2e-3) -> None:
    """So that the correlations are those of an adapter that has learned something."""
    optimizer = torch.optim.AdamW(adapter.trained.values(), lr=rate)
    for batch in batches:
        loss = -one_pass(adapter, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def one_pass(adapter: Adapter, batch: Batch) -> torch.Tensor:
    """S, as training computes its loss."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = adapter.model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    answered = labels != IGNORED
    return -F.cross_entropy(logits[answered].float(), labels[answered])


@torch.no_grad()
def naive(adapter: Adapter, batch: Batch, units: list[tuple[str, int]], alone: bool) -> list[float]:
    """S(M∖i), or S(M_i), for each of ``units``."""
    found = []
    for key, rank in units:
        for part in adapter.modules.values():
            part.rank_gate = torch.full_like(part.lora_a[:, 0], float(not alone))
        adapter.modules[key].rank_gate[rank] = float(alone)
        found.append(one_pass(adapter, batch).item())
    for part in adapter.modules.values():
        part.rank_gate = None
    return found


def clock(work: Any, cuda: bool) -> tuple[float, Any]:
    """Seconds and result."""
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def operations(work: Any) -> int:
    """Floating-point operations of the matrix products in ``work``."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def spearman(one: list[float], other: list[float]) -> float:
    ranks = torch.tensor([one, other]).argsort(dim=1).argsort(dim=1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def data(args: argparse.Namespace) -> tuple[Batch, list[Batch]]:
    """The dev batch, and training batches."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    task = tasks.load(compose("train", [f"task={args.task}"]).config.task)

    def batch(examples: list) -> Batch:
        made = encode.collate_causal(encode.encode_all(tokenizer, examples, 256), tokenizer.pad_token_id)
        return {key: value.to(args.device) for key, value in made.items() if key != "prompt_mask"}

    shuffled = random.Random(0).sample(task.train, 16 * args.steps)
    steps = [batch(shuffled[at : at + 16]) for at in range(0, len(shuffled), 16)]
    return batch(random.Random(0).sample(task.dev, args.batch)), steps


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama", choices=["llama", *SHAPES])
    parser.add_argument("--task", default="tiny_yesno")
    for name, default in (("batch", 32), ("rank", 8), ("rounds", 5), ("threads", 1), ("tokens", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sample", type=int, default=40, help="naive passes timed in a round, of each kind")
    parser.add_argument("--steps", type=int, default=0, help="training steps before scoring")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    adapter = adapted(args.model, args.rank, args.device)
    batch, steps = data(args)
    train(adapter, steps)
    units = ranks_of(adapter)
    sampled = units[:: max(1, len(units) // args.sample)][: args.sample]
    probe = Probe(batch, args.tokens)
    seconds: dict[str, list[float]] = {"naive": [], "engine": []}
    for number in range(args.rounds + 1):
        took, plain = clock(lambda: [naive(adapter, batch, sampled, alone) for alone in (False, True)], cuda)
        spent, exact = clock(lambda: score("ab", adapter, probe), cuda)
        if number or args.rounds == 0:
            seconds["naive"].append(took / len(sampled) * len(units))
            seconds["engine"].append(spent)
    difference = max(
        abs(value - exact.components[part][key][rank])
        for part, values in zip(("without", "alone"), plain, strict=True)
        for (key, rank), value in zip(sampled, values, strict=True)
    )
    values = {
        kind: [*chain(*score(kind, adapter, probe).values.values())]
        for kind in SCORE_KINDS
        if kind not in ("ab", "mixed")
    }
    own = [*chain(*exact.values.values())]
    plain_work = 2 * len(units) * operations(lambda: naive(adapter, batch, units[:1], False))
    record = {
        "command": "python scripts/bench_score.py",
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "machine": torch.cuda.get_device_name() if cuda else cpu_name(),
        "packages": package_versions(),
        "ranks": len(units),
        "batch": {"rows": len(batch["labels"]), "longest": batch["input_ids"].shape[1]},
        "tokens": int(batch["attention_mask"].sum()),
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "speedup": statistics.median(a / b for a, b in zip(seconds["naive"], seconds["engine"], strict=True)),
        "fewer_operations": plain_work / operations(lambda: score("ab", adapter, probe)),
        "largest_difference": difference,
        "spearman_with_ab": {kind: spearman(own, found) for kind, found in values.items()},
        "seconds": seconds,
    }
    print(json.dumps({key: value for key, value in record.items() if key != "packages"}, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
