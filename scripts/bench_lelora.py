"""What LeLoRA's choices cost in training: what the method does between steps against the steps themselves.

    python scripts/bench_lelora.py --phase 10 --out docs/results/bench_lelora.json
    python scripts/bench_lelora.py --shapes 4096 --device cuda --out docs/results/bench_lelora_gpu.json

Shapes of Llama: that of the bundled model, one of about 100M parameters, and a stack of four layers as wide as those of
7B, all with random weights, in fp32 on a CPU and in bf16 on a GPU. A step is forward, backward and AdamW on one batch;
a switch is what happens between two phases: rewards, folding, spectra, policy, new windows, dev gradients. All of it
runs as in training, phase after phase; figures are medians. The share of exploration is switch / (phase × step +
switch), that of training counts the steps after exploration as well; the first switch also decomposes all matrices,
which is paid once and stands apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_cli import methods
from lowrank_cli.config.composition import compose
from lowrank_cli.methods.protocol import AfterStep, Step
from lowrank_cli.runs.provenance import cpu_name, git_state, package_versions

#: hidden, intermediate, layers, heads, vocabulary
SHAPES = {"bundled": (128, 320, 6, 4, 1536), "100m": (768, 2048, 12, 12, 32000), "4096": (4096, 11008, 4, 32, 32000)}
TOKENS = {"bundled": (16, 64), "100m": (4, 128), "4096": (16, 512)}  #: batch and length


def model(name: str, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    hidden, intermediate, layers, heads, vocabulary = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    return LlamaForCausalLM(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def timed(work, device: str) -> float:
    """Seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(name: str, args: argparse.Namespace) -> dict:
    """Medians of one shape."""
    network = model(name, args.device)
    config = compose("train", ["method=lelora", f"method.phase={args.phase}", *args.overrides]).config.method
    method = methods.create(config)
    assert isinstance(method, AfterStep)
    adapter = method.adapt(network)
    optimizer = torch.optim.AdamW(list(adapter.trained.values()), lr=1e-3, fused=True)
    batch = torch.randint(SHAPES[name][-1], TOKENS[name], generator=torch.Generator().manual_seed(1)).to(args.device)
    network.train()

    def loss(number: int = 0) -> torch.Tensor:
        logits = network(input_ids=batch, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def train() -> None:
        loss().backward()
        optimizer.step()
        network.zero_grad()

    steps, switches = [], []
    last = args.rounds * config.phase
    for number in range(1, last + 1):
        now = Step(number, 100 * last, adapter, 1e-3, loss, lambda tensor: tensor, optimizer=optimizer)
        steps.append(timed(train, args.device))
        between = timed(lambda now=now: method.after_step(now), args.device)
        if number == 1:
            first = between
        elif number % config.phase == 0:
            switches.append(between)
    one, between = statistics.median(steps), statistics.median(switches)
    whole = config.phase * one
    of_training = config.explore * between / (whole + config.explore * between)
    print(
        f"{name:8} step {one * 1000:7.1f} ms  switch {between * 1000:8.1f} ms  share of training {of_training:.1%}  "
        f"first {first:.1f} s"
    )
    return {
        "parameters": sum(p.numel() for p in network.parameters()) - adapter.count(),
        "matrices": len(adapter.modules),
        "step_seconds": one,
        "switch_seconds": between,
        "share_of_exploration": between / (whole + between),
        "share_of_training": of_training,
        "first_switch_seconds": first,
        "all_switch_seconds": switches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the method, as for lrk train")
    parser.add_argument("--shapes", nargs="+", default=["bundled", "100m"], choices=SHAPES)
    parser.add_argument("--phase", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4, help="phases")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args()
    torch.set_num_threads(args.threads)
    found = {name: measure(name, args) for name in args.shapes}
    if args.out:
        record = {
            "command": "python scripts/bench_lelora.py",
            "settings": {key: value for key, value in vars(args).items() if key != "out"},
            "git": git_state(),
            "machine": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
            "packages": package_versions(),
            "shapes": found,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
