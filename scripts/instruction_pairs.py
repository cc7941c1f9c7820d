"""Instruction data for an encoder, from training sets of tasks that it is not tested on: does the answer fit?

    python scripts/instruction_pairs.py --data DIR --output DIR

Reads ``boolq``, ``arc_easy``, ``openbookqa``, ``gsm8k`` (train.jsonl) and ``e2e_nlg`` (validation.jsonl) below ``data``
and writes train.jsonl and validation.jsonl with the columns of RTE: sentence1 a question, sentence2 an answer, label 0
where the answer is its own and 1 where it is a wrong or another question's, half and half. The same rows every time.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

SETS = ("boolq", "arc_easy", "openbookqa", "gsm8k", "e2e_nlg")
TRAIN, VALIDATION = 2000, 200  #: pairs of each set, at most


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def own_and_other(name: str, rows: list[dict], draw: random.Random) -> Callable[[dict], tuple[str, str, str]]:
    """What makes (question, its answer, an answer that does not fit) of a row."""
    if name == "boolq":
        return lambda row: (row["question"], *(("yes", "no") if row["answer"] else ("no", "yes")))
    if name in ("arc_easy", "openbookqa"):
        return lambda row: (
            row["question"],
            row["choices"][row["answer"]],
            draw.choice([choice for at, choice in enumerate(row["choices"]) if at != row["answer"]]),
        )
    question, answer = ("question", "answer") if name == "gsm8k" else ("meaning_representation", "human_reference")

    def matched(row: dict) -> tuple[str, str, str]:
        other = draw.choice(rows)
        while other[question] == row[question]:
            other = draw.choice(rows)
        return row[question], row[answer], other[answer]

    return matched


def pairs(name: str, rows: list[dict], draw: random.Random) -> list[dict]:
    """One pair for each of at most ``TRAIN + VALIDATION`` rows, labels in turn."""
    draw.shuffle(rows)
    make = own_and_other(name, rows, draw)
    found = []
    for number, row in enumerate(rows[: TRAIN + VALIDATION]):
        question, own, other = make(row)
        found.append({"sentence1": question, "sentence2": other if number % 2 else own, "label": number % 2})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    draw = random.Random(0)
    splits: dict[str, list[dict]] = {"train": [], "validation": []}
    for name in SETS:
        file = "validation.jsonl" if name == "e2e_nlg" else "train.jsonl"
        made = pairs(name, read(args.data / name / file), draw)
        splits["validation"] += made[:VALIDATION]
        splits["train"] += made[VALIDATION:]
    args.output.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        draw.shuffle(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.output / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{args.output / split}.jsonl: {len(rows)} pairs")


if __name__ == "__main__":
    main()
