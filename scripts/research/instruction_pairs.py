"""Instruction data for an encoder, from sets of tasks that it is not tested on: is this the answer to that?

    python scripts/research/instruction_pairs.py --data DIR --output DIR

Reads ``arc_easy``, ``openbookqa``, ``gsm8k`` (train.jsonl) and ``e2e_nlg`` (validation.jsonl) below ``data`` and writes
train.jsonl and validation.jsonl with the columns of RTE: sentence1 a question, sentence2 an answer, label 0 where it is
the question's own and 1 where it is that of another question of the set, half and half. The same rows every time.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

#: Set: its file, and the columns of questions and answers.
SETS = {
    "arc_easy": ("train.jsonl", "question", "answer"),
    "openbookqa": ("train.jsonl", "question", "answer"),
    "gsm8k": ("train.jsonl", "question", "answer"),
    "e2e_nlg": ("validation.jsonl", "meaning_representation", "human_reference"),
}
TRAIN, VALIDATION = 2000, 250  #: pairs of each set


def read(folder: Path, name: str) -> list[tuple[str, str]]:
    """Questions with their answers; of listed choices the right one."""
    file, question, answer = SETS[name]
    rows = [json.loads(line) for line in (folder / name / file).read_text(encoding="utf-8").split("\n") if line]
    return [(row[question], row["choices"][row[answer]] if "choices" in row else row[answer]) for row in rows]


def pairs(rows: list[tuple[str, str]], draw: random.Random) -> list[dict]:
    """One pair for each of ``TRAIN + VALIDATION`` rows, labels in turn."""
    draw.shuffle(rows)
    found = []
    for number, (question, answer) in enumerate(rows[: TRAIN + VALIDATION]):
        if number % 2:
            answer = draw.choice([o for asked, o in draw.sample(rows, 10) if asked != question and o != answer])
        found.append({"sentence1": question, "sentence2": answer, "label": number % 2})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    draw = random.Random(0)
    splits: dict[str, list[dict]] = {"train": [], "validation": []}
    for name in SETS:
        made = pairs(read(args.data, name), draw)
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
