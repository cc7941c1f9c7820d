"""Data-parallel runs, with a stage that needs no model: how workers are started, and how their end is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import one_line, runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fake_stages")]
TWO = ("hardware.processes=2", "train.max_steps=3", "train.warmup=0.1")


def history(path: Path) -> list[tuple[int, bool]]:
    rows = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return [(row["step"], row["resumed"]) for row in rows]


def status(path: Path) -> str:
    return json.loads((path / "run.json").read_text())["status"]


def test_only_the_first_process_writes(lrk):
    ended = lrk("train", *TWO)
    assert (ended.code, ended.err) == (0, "")
    assert history(runs()[0]) == [(1, False), (2, False), (3, False)] and status(runs()[0]) == "done"


def test_a_failure_is_said_once_and_continued(lrk):
    ended = lrk("train", *TWO, "train.learning_rate=2")
    assert (ended.code, ended.err) == (1, "error: train/loss is nan at step 2\n")
    Path("mended").touch()
    assert lrk("train", "--resume", "outputs/latest").code == 0
    assert history(runs()[0]) == [(1, False), (2, True), (3, True)]


def test_a_mistake_leaves_nothing(lrk):
    assert one_line(lrk("train", *TWO, "task.max_length=3")) == "task.max_length: 3 is too short"


def test_a_bug_shows_its_traceback(lrk):
    ended = lrk("train", *TWO, "train.weight_decay=9")
    assert ended.code == 1 and "RuntimeError: a bug" in ended.err
    assert ended.err.endswith("error: RuntimeError: a bug\n") and (runs()[0] / "error.txt").is_file()


def test_an_interrupt_says_how_to_go_on(lrk):
    ended = lrk("train", *TWO[:-1], "train.warmup=1")
    assert ended.code == 130 and "lrk train --resume" in ended.err and status(runs()[0]) == "interrupted"
    assert lrk("train", "--resume", "outputs/latest").code == 0
