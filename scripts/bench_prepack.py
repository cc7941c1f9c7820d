"""A decoding step with the base model's weights packed (`hardware.prepack=true`), beside the model as it is.

    python scripts/bench_prepack.py --out docs/results/bench_prepack.json

Llama with random weights (`model.shape=100m`), fp32 on a CPU: one batch of rows, each with another LoRA (r = 16, all
roles) out of a bank, and the same batch without adapters, both on the plain model and on the packed one. All four are
measured in turn, round after round; a ratio is the median over the rounds of step time / the plain model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from lowrank_cli.adapter.kv_cache import pass_cache, returned_cache
from lowrank_cli.adapter.module_copy import copied
from lowrank_cli.bench.decode_rows import quartiles
from lowrank_cli.bench.shared_weights import Twin, crowds
from lowrank_cli.config.composition import compose
from lowrank_cli.models.prepack import prepack
from lowrank_cli.models.shape import random_model
from lowrank_cli.runs.provenance import cpu_name, git_state, package_versions
from lowrank_cli.schema import BASE


@torch.no_grad()
def step_seconds(twin: Twin, prompts: torch.Tensor, tokens: int) -> tuple[float, torch.Tensor]:
    """Median over ``tokens`` steps behind the prompts (B, T), and the last logits (B, V)."""
    with twin.around():
        cache = returned_cache(twin.model(input_ids=prompts, use_cache=True))
        times = []
        for _ in range(tokens):
            began = time.perf_counter()
            out = twin.model(input_ids=prompts[:, :1], use_cache=True, **pass_cache(twin.model, cache))
            logits = out.logits[:, -1]
            times.append(time.perf_counter() - began)
    return statistics.median(times), logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["model.shape=100m"], help="as for lrk bench")
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = compose("bench", args.overrides).config
    plain = random_model(config.model, config.hardware, torch.device("cpu"))[0].requires_grad_(False)
    packed = copied(plain)
    prepack(packed)
    variants = {BASE: None, "lora": compose("train", ["method=lora", "method.rank=16"]).config.method}
    twins = {
        f"{kind}, {args.tenants} tenants" if name == "lora" else kind: twin
        for kind, model in (("plain", plain), ("packed", packed))
        for name, twin in crowds(model, variants, [args.tenants], rows=args.tenants, seed=1)[args.tenants].items()
    }
    prompts = torch.randint(plain.config.vocab_size, (args.tenants, 64))
    seconds: dict[str, list[float]] = {name: [] for name in twins}
    logits = {}
    names = list(twins)
    for number in range(args.rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            own, logits[name] = step_seconds(twins[name], prompts, args.tokens)
            seconds[name].append(own)
    rows = {}
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(own[1:], seconds["plain"][1:], strict=True)]  # the first warms up
        low, high = quartiles(ratios)
        rows[name] = {
            "ms_per_step": 1000 * statistics.median(own[1:]),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [low, high],
            "all_ms": [1000 * second for second in own],
        }
        print(f"{name:18} {rows[name]['ms_per_step']:7.1f} ms  {rows[name]['ratio']:.3f} ({low:.3f} – {high:.3f})")
    pairs = [("plain", "packed"), *((name, name.replace("plain", "packed")) for name in twins if "plain," in name)]
    apart = max(((logits[one] - logits[other]).abs().max() / logits[one].abs().max()).item() for one, other in pairs)
    print(f"logits: packed and plain differ by {apart:.1e} of the largest")
    record = {
        "command": " ".join(["python scripts/bench_prepack.py", *args.overrides]),
        "git": git_state(),
        "machine": cpu_name(),
        "threads": args.threads,
        "packages": package_versions(),
        "tenants": args.tenants,
        "logits_differ": apart,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
