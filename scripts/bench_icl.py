"""What in-context learning costs: a shared KV cache against whole prompts, and IDAICL against plain scoring.

    python scripts/bench_icl.py --shots 8 --queries 256 --out docs/results/bench_icl.json

One model, one task, the same demonstrations; the variants run in turn in one process (plain and ida in pairs, in
alternating order), and the figures are medians of the process's CPU time (one thread; wall time on a GPU):

    whole    the full prompt of every query × answer, in batches of alike lengths
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
from lowrank_cli.runs.provenance import cpu_name, git_state, package_versions
from lowrank_cli.stages import calibrate, session
from lowrank_cli.stages.candidates import answers, choice_scores, with_demonstrations
from lowrank_cli.stages.demonstrations import draw
from lowrank_cli.tasks import encode


@torch.no_grad()
def whole(ready: session.Session, examples: list, prompts: list[str], shots: int) -> list[list[float]]:
    """Log probabilities of every answer by a full pass over prompt and answer, nothing shared."""
    rows = []
    tokens = encode.encode_prompts(ready.tokenizer, prompts, [ready.room(shots)] * len(prompts))
    for index, example in enumerate(examples):
        rows += [(index, column, tokens[index], answer) for column, answer in enumerate(answers(ready, example))]
    rows.sort(key=lambda row: len(row[2]) + len(row[3]))
    found = [[0.0] * len(example.choices) for example in examples]
    size = ready.batch_size
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        coded = [encode.Encoded(prompt + answer, len(prompt)) for _, _, prompt, answer in part]
        batch = {k: v.to(ready.device) for k, v in encode.collate_causal(coded, ready.tokenizer.pad_token_id).items()}
        logits = ready.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        for (index, column, prompt, answer), row in zip(part, logits, strict=True):
            said = row[len(prompt) - 1 : len(prompt) + len(answer) - 1].float()  # (K, V)
            found[index][column] = log_softmax(said, torch.tensor(answer, device=said.device)[:, None]).sum().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    for name, default in (("shots", 8), ("queries", 256), ("rounds", 5), ("pairs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args()
    overrides = ["hardware.threads=1", *args.overrides, f"evaluate.shots={args.shots}"]
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
    pairs = zip(seconds["ida"], seconds["plain"], strict=True)
    ratios = {
        "whole / plain": median["whole"] / median["plain"],
        "whole / ida": median["whole"] / median["ida"],
        "ida / plain": statistics.median(ida / plain for ida, plain in pairs),
    }
    for name, values in seconds.items():
        print(f"{name:6} {1000 * statistics.median(values) / len(queries):8.2f} ms a query")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    if args.out:
        record = {
            "command": f"python scripts/bench_icl.py --shots {args.shots} --queries {args.queries} "
            f"--rounds {args.rounds} --pairs {args.pairs} {' '.join(args.overrides)}".strip(),
            "commit": git_state(),
            "machine": torch.cuda.get_device_name() if ready.device.type == "cuda" else cpu_name(),
            "packages": package_versions(),
            "tokens": {"vocabulary": head.shape[0], "width": head.shape[1]},
            "median_seconds": median,
            "median_ratio": ratios,
            "seconds": seconds,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
