"""What in-context learning costs: a shared KV cache against whole prompts, and IDAICL against plain scoring.

    python scripts/bench_icl.py --out docs/results/bench_icl.json
    python scripts/bench_icl.py task=tiny_topic --out docs/results/bench_icl_topic.json

One model, one task, the same demonstrations; the variants run in turn in one process (plain and ida in pairs, in
alternating order), and the figures are medians of the process's CPU time (one thread; wall time on a GPU). What ida
adds is the median of the pairs' ratios, with the 95 % interval of that median by order statistics:

    whole    the full prompt of every query × answer, in batches of alike lengths, logits of the answer only
    plain    the demonstrations' KV cache computed once, then log probabilities of the answers
    ida      the same with the IDA-Softmax, its precomputation and its prior included

Other keys of ``lrk evaluate`` follow as overrides: ``task=tiny_topic model=gpt2 hardware=gpu``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from lowrank_cli.calibration.head import head_weight
from lowrank_cli.calibration.ida import IdaSoftmax, log_softmax
from lowrank_cli.config import compose
from lowrank_cli.icl import calibrate
from lowrank_cli.icl.demonstrations import draw
from lowrank_cli.inference import session
from lowrank_cli.inference.choice_scores import answers, choice_scores, with_demonstrations
from lowrank_cli.report.statistics import median_interval
from lowrank_cli.runs.provenance import cpu_name, git_state, package_versions
from lowrank_cli.tasks import encode


@torch.no_grad()
def whole(ready: session.Session, examples: list, prompts: list[str], shots: int) -> list[list[float]]:
    """Log probabilities of every answer by a full pass over prompt and answer, nothing shared."""
    rows = []
    tokens = encode.encode_prompts(ready.tokenizer, prompts, [ready.max_length(shots)] * len(prompts))
    for index, example in enumerate(examples):
        rows += [(index, column, tokens[index], answer) for column, answer in enumerate(answers(ready, example))]
    rows.sort(key=lambda row: len(row[2]) + len(row[3]))
    found = [[0.0] * len(example.choices) for example in examples]
    size = ready.batch_size
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = encode.collate_prompts([prompt + answer for *_, prompt, answer in part], ready.tokenizer.pad_token_id)
        batch = {key: value.to(ready.device) for key, value in batch.items()}  # (B, T), padded on the left
        positions = (batch["attention_mask"].cumsum(dim=-1) - 1).clamp_min(0)
        longest = max(len(answer) for *_, answer in part)
        logits = ready.model(**batch, position_ids=positions, use_cache=False, logits_to_keep=longest + 1).logits
        for (index, column, _, answer), row in zip(part, logits, strict=True):
            said = row[-len(answer) - 1 : -1].float()  # (longest + 1, V) -> (K, V)
            found[index][column] = log_softmax(said, torch.tensor(answer, device=said.device)[:, None]).sum().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    for name, default in (("shots", 8), ("queries", 512), ("rounds", 5), ("pairs", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args()
    overrides = ["hardware.threads=1", "evaluate.batch_size=64", *args.overrides, f"evaluate.shots={args.shots}"]
    ready = session.start(compose("train", ["method=idaicl", "task=tiny_sentiment", *overrides]).config)
    ready.model.eval()
    queries = ready.task.test[: args.queries]
    prompts = with_demonstrations(queries, draw(ready.task.train, args.shots, 0))
    fitted = calibrate.fit(ready).wordings[0].tensors
    head = head_weight(ready.model)

    def ida() -> list[list[float]]:
        def rule(tokens: tuple[int, ...]) -> IdaSoftmax:
            return IdaSoftmax(head, fitted["mean"], fitted["factor"], 0.5, tokens)

        scores = torch.tensor(choice_scores(ready, queries, prompts, args.shots, rule_of=rule))
        return ready.method.adjust(fitted, scores[:0], scores).tolist()

    variants = {
        "whole": lambda: whole(ready, queries, prompts, args.shots),
        "plain": lambda: choice_scores(ready, queries, prompts, args.shots),
        "ida": ida,
    }
    clock = time.perf_counter if ready.device.type == "cuda" else time.process_time
    assert torch.allclose(torch.tensor(variants["whole"]()), torch.tensor(variants["plain"]()), atol=1e-2)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name in ("whole", *("plain", "ida", "ida", "plain") * args.pairs):
            began = clock()
            variants[name]()
            seconds[name].append(clock() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = [ida / plain for ida, plain in zip(seconds["ida"], seconds["plain"], strict=True)]
    low, high = median_interval(pairs)
    ratios = {
        "whole / plain": median["whole"] / median["plain"],
        "whole / ida": median["whole"] / median["ida"],
        "ida / plain": statistics.median(pairs),
    }
    for name, values in seconds.items():
        print(f"{name:6} {1000 * statistics.median(values) / len(queries):8.2f} ms a query")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    print(f"ida / plain: 95 % interval of the median {low:.3f} to {high:.3f} ({len(pairs)} pairs)")
    if args.out:
        record = {
            "command": f"python scripts/bench_icl.py --shots {args.shots} --queries {args.queries} "
            f"--rounds {args.rounds} --pairs {args.pairs} {' '.join(args.overrides)}".strip(),
            "commit": git_state(),
            "machine": torch.cuda.get_device_name() if ready.device.type == "cuda" else cpu_name(),
            "packages": package_versions(),
            "shape": {
                "vocabulary": head.shape[0],
                "width": head.shape[1],
                "answers": len(ready.task.label_words),
                "batch": ready.batch_size,
            },
            "median_seconds": median,
            "median_ratio": ratios,
            "interval of ida / plain": [low, high],
            "seconds": seconds,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
