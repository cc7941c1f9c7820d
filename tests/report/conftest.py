"""Run folders to compare."""

from __future__ import annotations

import itertools
import json

import pytest

from lowrank_cli.runs import Run


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Add a finished run; dotted keys of ``config`` are set in its config.yaml, ``right`` are its answers."""
    monkeypatch.setattr("lowrank_cli.runs.run.git_state", lambda: {"commit": "0" * 40, "dirty": False})  # for speed
    outputs, number = tmp_path / "outputs", itertools.count()

    def add(
        method, seed, value, *, task="tiny_yesno", stage="train", metric="test/accuracy", folder=None, config=None,
        status="done", run=None, right=None, **metrics,
    ):  # fmt: skip
        resolved = {
            "seed": seed,
            "outputs": str(outputs),
            "name": None,
            "method": {"name": method, "rank": 8},
            "task": {"name": task, "metric": "accuracy"},
            "evaluate": {"split": "test", "num_beams": 1},
        }
        resolved |= {"run": str(run)} if stage == "evaluate" else {"train": {"learning_rate": 1e-3}}
        for key, setting in (config or {}).items():
            group, name = key.split(".")
            resolved.setdefault(group, {})[name] = setting
        made = Run.create(
            outputs, stage=stage, config=resolved, choices={"method": method, "model": "llama", "task": task},
            overrides=[], command="lrk", folder=folder or outputs / "day" / f"{next(number):03d}-{method}",
        )  # fmt: skip
        made.update(started=f"2025-01-01T00:{next(number):02d}:00+00:00")
        if right is not None:
            lines = [
                {"index": i, "prompt": f"{task} {i}?", "prediction": "yes", "references": ["yes"], "correct": bool(one)}
                for i, one in enumerate(right)
            ]
            made.write_text("predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if status == "done":
            made.finish({metric: value, "trainable_parameters": 262144, **metrics})
            made.update(peak_memory_bytes=2**29, seconds=60.0)
        elif status == "failed":
            made.fail("no")
        return made

    add.outputs = outputs
    return add
