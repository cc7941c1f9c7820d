"""A study's folder with invented runs, as ``lrk study`` leaves it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_cli.runs import Run

BASELINE = "lora"
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
#: Of each arm: mean accuracy, parameters, seconds of training, best learning rate.
ARMS = {
    "lora": (0.80, 107_520, 60.0, 1e-3),
    "rslora": (0.88, 107_520, 61.0, 3e-4),
    "dora": (0.81, 112_000, 95.0, 1e-3),
    "lora_fa": (0.74, 53_760, 48.0, 3e-3),
}


def make_study(
    folder: Path,
    *,
    arms: Sequence[str] = tuple(ARMS),
    tasks: Sequence[str] = ("tiny_yesno", "tiny_sentiment"),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    examples: int = 40,
    group: str = "llama",
    figures: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write a study of ``arms`` × ``tasks`` × ``seeds`` whose answers agree with their accuracy, and return it."""
    folder.mkdir(parents=True)
    ledger = {
        "name": "variants",
        "baseline": BASELINE,
        "arms": list(arms),
        "pools": {},
        "seeds": list(seeds),
        "groups": {group: list(tasks)},
    }
    (folder / "study.json").write_text(json.dumps(ledger))
    (folder / "tuning.json").write_text(json.dumps([_tuned(group, task, arm) for task in tasks for arm in arms]))
    for task in tasks:
        hard = random.Random(task)
        difficulty = [hard.random() for _ in range(examples)]
        for arm in arms:
            for seed in seeds:
                make_run(folder / "runs" / group / task / arm / str(seed), arm, task, seed, difficulty, figures)
    return folder


def make_run(
    folder: Path, arm: str, task: str, seed: int, difficulty: Sequence[float], figures: Sequence[dict[str, Any]] = ()
) -> Run:
    """A finished run that answers an example right if its ability on this seed exceeds the example's difficulty."""
    accuracy, parameters, seconds, _ = ARMS[arm]
    chance = random.Random(f"{arm} {task} {seed}")
    ability = accuracy + chance.gauss(0, 0.02)
    config = {
        "seed": seed,
        "outputs": "outputs",
        "name": None,
        "method": {"name": arm, "rank": 8},
        "task": {"name": task, "metric": "accuracy"},
        "evaluate": {"split": "test"},
        "train": {"learning_rate": ARMS[arm][3]},
    }
    choices = {"method": arm, "model": "llama", "task": task}
    run = Run.create(
        folder.parent, stage="train", config=config, choices=choices, overrides=[f"method={arm}", f"seed={seed}"],
        command=f"lrk train method={arm} task={task} seed={seed}", folder=folder,
    )  # fmt: skip
    for step in range(10, 210, 10):
        run.log(
            {"step": step, "train/loss": 3 * math.exp(-step / 40) + 0.3 + chance.gauss(0, 0.03), "learning_rate": 1e-3}
        )
        if step % 50 == 0:
            run.log({"step": step, "dev/loss": 2 * math.exp(-step / 50) + 0.45})
    rows = []
    for index, hard in enumerate(difficulty):
        right = hard + chance.gauss(0, 0.03) < ability
        label = index % 2
        choice = label if right else 1 - label
        answers = ("no", "yes")
        rows.append({
            "index": index, "prompt": f"zorp {index} is red. Is zorp {index} red?", "prediction": answers[choice],
            "label": label, "choice": choice, "references": [answers[label]], "correct": right,
        })  # fmt: skip
    run.write_text("predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if figures:
        run.write_json("figures.json", list(figures))
    share = sum(row["label"] == row["choice"] for row in rows) / len(rows)
    run.finish({
        "test/accuracy": share, "dev/loss": 0.5 - share / 5, "trainable_parameters": parameters,
        "total_parameters": 1_337_984, "train/seconds": seconds + chance.gauss(0, 1),
    })  # fmt: skip
    run.update(peak_memory_bytes=int(6e8 + 900 * parameters), seconds=seconds + 5)
    return run


def _tuned(group: str, task: str, arm: str) -> dict[str, Any]:
    best = ARMS[arm][3]
    scores = {rate: 0.4 + 0.05 * math.log10(rate / best) ** 2 for rate in RATES}
    trials = [{"values": {"train.learning_rate": r}, "scores": {"100": s}, "mean": s} for r, s in scores.items()]
    end = {RATES[0]: "lower", RATES[-1]: "upper"}.get(best)
    return {
        "group": group,
        "task": task,
        "arm": arm,
        "metric": "dev/loss",
        "lower_is_better": True,
        "seeds": [100],
        "keys": ["train.learning_rate"],
        "trials": trials,
        "best": {"train.learning_rate": best},
        "at_edge": {"train.learning_rate": end} if end else {},
    }
