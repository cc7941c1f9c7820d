"""What an adapter costs in training: forward + backward against the adapter-free bound and the PEFT library's LoRA.

    python scripts/bench_train.py --rounds 9 --out docs/results/bench_train.json

The bound is the frozen model's forward and the backward to its input embeddings: what any adapter on all layers must
at least pay. All variants share one random-weight Llama shape and one batch and run in turn (A B C …) in one process;
the figures are medians over rounds and their ratios to the bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_cli.adapter.core import inject
from lowrank_cli.adapter.families import find_sites
from lowrank_cli.runs.provenance import cpu_name, package_versions


def shape(args: argparse.Namespace) -> LlamaForCausalLM:
    """The same random model each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
    )
    model = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype))
    return model.requires_grad_(False).train()


def ours(model: LlamaForCausalLM, rank: int, dropout: float) -> LlamaForCausalLM:
    return inject(model, find_sites(model, ["all"]), rank=rank, alpha=2 * rank, dropout=dropout).model


def peft_lora(model: LlamaForCausalLM, rank: int, dropout: float) -> LlamaForCausalLM:
    import peft

    targets = [site.path for site in find_sites(model, ["all"])]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets)
    peft.get_peft_model(model, config)
    return model


def step(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """One forward and backward pass; gradients reach the input embeddings in every variant."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    for parameter in model.parameters():
        parameter.grad = None


def clock(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Seconds of one step."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(model, ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 768),
        ("intermediate", 2048),
        ("layers", 12),
        ("heads", 12),
        ("vocabulary", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("batch", 4), ("tokens", 128), ("rank", 16), ("rounds", 9), ("warmup", 2), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    variants = {
        "bound": shape(args),
        "ours": ours(shape(args), args.rank, args.dropout),
        "peft": peft_lora(shape(args), args.rank, args.dropout),
    }
    ids = torch.randint(args.vocabulary, (args.batch, args.tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(args.device)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(args.warmup + args.rounds):
        for name, model in variants.items():
            took = clock(model, ids)
            if round_ >= args.warmup:
                seconds[name].append(took)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = {
        name: statistics.median(a / b for a, b in zip(values, seconds["bound"], strict=True))
        for name, values in seconds.items()
    }
    for name in variants:
        print(f"{name:6} {median[name] * 1000:8.1f} ms   {ratio[name]:.3f} × bound")
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        record = {
            "command": "python scripts/bench_train.py",
            "settings": settings,
            "commit": commit,
            "machine": torch.cuda.get_device_name() if ids.is_cuda else cpu_name(),
            "packages": package_versions(),
            "median_seconds": median,
            "median_ratio_to_bound": ratio,
            "seconds": seconds,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
