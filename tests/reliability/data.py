"""Files of a user's own data: rows of a task, and prompts for many tenants, with anything in them.

A file is refused in one line that names it, or measured. Of prompts, every line gets its answer or its error, and a
bad one takes no other along.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from . import mutate
from .box import SLOW, Box
from .command import Ended
from .samples import Samples
from .trial import Failed

ROWS = 6
#: Tasks by how they are answered, and a good row of each.
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"sentence": "a fine film", "label": 1},
    "rte": {"sentence1": "zorp is red.", "sentence2": "zorp is not blue.", "label": 0},
    "boolq": {"question": "is zorp red", "answer": True},
    "arc_easy": {
        "question": "Which is red?",
        "choices": {"text": ["zorp", "blap"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "openbookqa": {
        "question_stem": "Which is red?",
        "choices": {"text": ["zorp", "blap"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "gsm8k": {"question": "What is 1 + 2?", "answer": "It is 3.\n#### 3"},
    "e2e_nlg": {"meaning_representation": "name[Zorp], food[red]", "human_reference": "Zorp serves red food."},
}
SPLITS = ("train", "validation", "test")
BROKEN = ('{"sentence": ', "[" * mutate.DEEP, '{"a": ' * mutate.DEEP, "nan", "null", "[1]", '"x"', "{}", "\x00", "\\")


def trial(seed: int, box: Box, samples: Samples) -> None:
    chance = random.Random(seed)
    if chance.random() < 0.35:
        _prompts(chance, box, samples)
    else:
        _rows(chance, box, samples)


def _rows(chance: random.Random, box: Box, samples: Samples) -> None:
    """One changed row of a task, or a file changed as a whole, under an evaluation of the bare model."""
    task = chance.choice(list(TASKS))
    samples.once(f"data {task}", lambda root: _measured(Box(root, samples.home), task))
    _write(box, task)
    path = box.work / "data" / f"{chance.choice(SPLITS)}.jsonl"
    if chance.random() < 0.7:
        rows = path.read_text().split("\n")
        at = chance.randrange(ROWS)
        if chance.random() < 0.2:
            rows[at] = chance.choice(BROKEN)
            what = f"line {at + 1} {rows[at][:12]!r}"
        else:
            row, what = mutate.alter(TASKS[task], chance, box.executed)
            rows[at] = json.dumps(row, ensure_ascii=chance.random() < 0.5)
        path.write_text("\n".join(rows), errors="surrogatepass")
    else:
        what = mutate.change(path, chance, box.executed)
    box.case = f"{task}, {path.name}: {what}"
    before = box.snapshot()
    ended = box.judged(_evaluate(box, task), names=(path.name, "task."))
    if ended.code and box.snapshot() != before:
        raise Failed("refused, but a run is left")


def _measured(box: Box, task: str) -> dict[str, Any]:
    """The files as they are before a change do no harm."""
    _write(box, task)
    box.judged(_evaluate(box, task), codes=(0,))
    return {}


def _evaluate(box: Box, task: str) -> Ended:
    where = (f"task={task}", "task.path=data", "task.splits=given", f"task.limit={ROWS}")
    return box.start("evaluate", "method=none", *where, "hardware.threads=1").wait(SLOW)


def _write(box: Box, task: str) -> None:
    (box.work / "data").mkdir()
    for split in SPLITS:
        (box.work / "data" / f"{split}.jsonl").write_text("".join(json.dumps(TASKS[task]) + "\n" for _ in range(ROWS)))


def _prompts(chance: random.Random, box: Box, samples: Samples) -> None:
    """Two good lines with a changed one between them."""
    run = samples.place("trained_lora", box)
    good = {"tenant": str(run), "prompt": "zorp is red. Is zorp red?"}
    if chance.random() < 0.2:
        text = chance.choice(BROKEN)
        what = repr(text[:12])
    else:
        row, what = mutate.alter(good, chance, box.executed)
        text = json.dumps(row, ensure_ascii=chance.random() < 0.5)
    box.case = f"prompts, a line between others: {what}"
    path = box.work / "prompts.jsonl"
    path.write_text(f"{json.dumps(good)}\n{text}\n{json.dumps({**good, 'tenant': None})}\n", errors="surrogatepass")
    short = ("generate.max_new_tokens=2", "hardware.threads=1")
    ended = box.run("generate", f"run={run}", "--tenants", "prompts.jsonl", *short, names=("prompts.jsonl", "line 2"))
    answers = [json.loads(line) for line in ended.out.split("\n") if line]
    if ended.code == 2 and not answers and _is_undecodable(path):
        return
    if sum("answer" in row for row in answers) < 2:
        raise Failed(f"one bad line takes the others along (exit code {ended.code}: {ended.err.strip()[:120]})")


def _is_undecodable(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
        return False
    except UnicodeDecodeError:
        return True
