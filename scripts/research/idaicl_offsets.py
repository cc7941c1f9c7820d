"""Why IDAICL's offsets do not help: what its terms do, and what other places to read the demonstrations' bias give.

    python scripts/research/idaicl_offsets.py MODEL_FOLDER TASK OVERRIDE… [--shots 4 12] [--sets 8] [--queries 100]

A trial in memory, without run folders. ``OVERRIDE``s choose the data, such as task.path=FOLDER task.splits=given.
For each number of demonstrations and every set it scores the queries, each demonstration after the others, and the
demonstrations inside the prompt, and prints the accuracy (mean ± standard deviation over the sets) with

- IDAICL as published, and its mean term and its covariance term alone, by features after answers and after prompts,
  for several λ, negative ones too;
- the mean answer subtracted that the demonstrations give inside the prompt, and after the others (``loo``);
- the best constant offset of each set (an oracle).

Last, it prints how much IDAICL's and the best offsets vary over the sets, in nats.

Labels must differ in their first token, which alone is scored.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from statistics import mean, stdev

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cli import config, tasks
from lowrank_cli.adapter.kv_cache import pass_cache
from lowrank_cli.calibration.contextual import bias
from lowrank_cli.calibration.ida import log_softmax, offsets, statistics
from lowrank_cli.calibration.oracle import best_offsets
from lowrank_cli.inference.choice_scores import Prefix, common_prefix, with_demonstrations
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example

POOL = 200  #: training examples
BATCH = 16
STRENGTHS = (-1.0, -0.5, 0.5, 1.0)


class Reader:
    """The hidden states that a model's head reads."""

    def __init__(self, folder: str):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.head = self.model.get_output_embeddings().weight.detach()  # (V, D)
        self.padding = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return encode.encode_prompts(self.tokenizer, texts, [10**9] * len(texts))

    @torch.no_grad()
    def last(self, texts: Sequence[str]) -> Tensor:
        """Behind each text: (N, D). What all begin with runs once."""
        rows = self.tokens(texts)
        shared = common_prefix(rows) if len(rows) > 1 else []
        prefix = Prefix(self.model, shared) if shared else None
        states: dict[int, Tensor] = {}
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), BATCH):
            indices = order[start : start + BATCH]
            batch = encode.collate_prompts([rows[index] for index in indices], self.padding)
            mask = batch["attention_mask"]
            cache = prefix.after((1 - mask).sum(dim=1)) if prefix else None
            out = self.model.base_model(
                input_ids=batch["input_ids"][:, len(shared) :],
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=-1) - 1).clamp_min(0)[:, len(shared) :],
                **pass_cache(self.model, cache),
            )
            states |= dict(zip(indices, out.last_hidden_state[:, -1], strict=True))
        return torch.stack([states[index] for index in range(len(rows))])

    @torch.no_grad()
    def inside(self, examples: Sequence[Example]) -> Tensor:
        """Behind the prompt of each of several demonstrations in one text: (m, D)."""
        texts = ["".join(f"{one.prompt}{one.answer}\n\n" for one in examples[:index]) for index in range(len(examples))]
        ends = [len(row) - 1 for row in self.tokens([t + e.prompt for t, e in zip(texts, examples, strict=True)])]
        ids = torch.tensor(self.tokens([texts[-1] + examples[-1].prompt]))
        return self.model.base_model(input_ids=ids).last_hidden_state[0, ends]


class Terms:
    """IDAICL's offsets by some features, with a strength of its own for each of the two terms."""

    def __init__(self, head: Tensor, features: Tensor, first: Tensor):
        found = statistics(features, torch.zeros(len(features), dtype=torch.long), 1)
        self.mean = offsets(head, found.mean, torch.zeros_like(found.factor[:1]), 1.0, first)  # (Y, V)
        self.covariance = offsets(head, torch.zeros_like(found.mean), found.factor, 1.0, first)  # (Y, V)

    def scores(self, logits: Tensor, first: Tensor, mean: float, covariance: float) -> Tensor:
        """logits (N, V) -> (N, Y)."""
        shifts = mean * self.mean + covariance * self.covariance  # (Y, V)
        return torch.stack(
            [z - (logits + o).logsumexp(1) for z, o in zip(logits[:, first].t(), shifts, strict=True)], 1
        )


def trial(reader: Reader, pool: Sequence[Example], queries: Sequence[Example], shots: int, sets: int) -> None:
    """Print the table of one number of demonstrations."""
    first = torch.tensor(
        [encode.candidates(reader.tokenizer, pool[0].prompt, [word])[0][0] for word in pool[0].choices]
    )
    assert len(set(first.tolist())) == len(first), "labels must differ in their first token"
    right = torch.tensor([example.label for example in queries])
    by_place = {
        "after answers": Terms(reader.head, reader.last([one.prompt + one.answer for one in pool]), first),
        "after prompts": Terms(reader.head, reader.last([one.prompt for one in pool]), first),
    }
    found: dict[str, list[float]] = {}
    own, needed = [], []
    for number in range(sets):
        shown = random.Random(f"{shots} {number}").sample(list(pool), shots)

        def asked(examples: Sequence[Example], after: Sequence[Sequence[Example]]) -> Tensor:
            prompts = [with_demonstrations([one], before)[0] for one, before in zip(examples, after, strict=True)]
            return reader.last(prompts) @ reader.head.t()  # (N, V)

        def add(name: str, scores: Tensor) -> None:
            found.setdefault(name, []).append((scores.argmax(dim=1) == right).float().mean().item())

        def answers(logits: Tensor) -> Tensor:
            return log_softmax(logits, first.expand(len(logits), -1))  # (N, Y)

        logits = asked(queries, [shown] * len(queries))
        plain = answers(logits)
        add("plain", plain)
        for place, terms in by_place.items():
            add(f"IDAICL, λ = 0.5, features {place}", terms.scores(logits, first, 0.5, 0.5))
            add(f"covariance term alone, λ = 0.5, {place}", terms.scores(logits, first, 0.0, 0.5))
            for strength in STRENGTHS:
                add(f"mean term alone, λ = {strength:g}, {place}", terms.scores(logits, first, strength, 0.0))
        others = [[other for other in shown if other is not one] for one in shown]
        for name, those in {
            "demonstrations inside the prompt": reader.inside(shown) @ reader.head.t(),
            "demonstrations after the others (loo)": asked(shown, others),
        }.items():
            add(f"minus the mean answer of {name}", plain - bias(answers(those).log_softmax(dim=-1)))
        best = best_offsets(plain.double(), right, torch.zeros(len(first), dtype=torch.float64)).float()
        add("best offset of the set (oracle)", plain + best)
        ours = (by_place["after answers"].scores(logits, first, 0.5, 0.5) - plain).mean(dim=0)
        own.append(ours - ours.mean())
        needed.append(best - best.mean())
    print(f"\n| {shots} demonstrations, {sets} sets, {len(queries)} queries | accuracy |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {100 * mean(values):.1f} ± {100 * stdev(values):.1f} |")
    for name, values in {"IDAICL's": own, "the best": needed}.items():
        spread = torch.stack(values).std(dim=0).mean()
        print(f"| spread of {name} offset over the sets, mean of labels | {spread:.2f} nats |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a transformers model")
    parser.add_argument("task")
    parser.add_argument("overrides", nargs="*", help="such as task.path=FOLDER")
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--sets", type=int, default=8)
    parser.add_argument("--queries", type=int, default=100)
    args = parser.parse_args()
    task = tasks.load(config.compose("train", ["method=idaicl", f"task={args.task}", *args.overrides]).config.task)
    draw, reader = random.Random(0), Reader(args.model)
    pool, queries = draw.sample(list(task.train), POOL), draw.sample(list(task.test), args.queries)
    for shots in args.shots:
        trial(reader, pool, queries, shots, args.sets)


if __name__ == "__main__":
    main()
