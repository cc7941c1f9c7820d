"""Data-parallel runs, with a stage that needs no model: how workers are started, and how their end is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import one_line, runs
from forked import Lrk, unused_port

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


def test_two_nodes_make_one_run(lrk, monkeypatch):
    nodes = ("hardware.nodes=2", "train.max_steps=3", "train.warmup=0.1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(unused_port()))
    monkeypatch.setenv("NODE_RANK", "1")
    second = Lrk("train", *nodes)
    monkeypatch.setenv("NODE_RANK", "0")
    ended = lrk("train", *nodes)
    assert (ended.code, ended.err) == (0, "")
    assert (second.wait(), second.output(), second.errors()) == (0, "", "")
    assert history(runs()[0]) == [(1, False), (2, False), (3, False)] and status(runs()[0]) == "done"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "hardware.nodes: 2, but NODE_RANK is '' (allowed: 0 to 1, another on each node; srun sets SLURM_NODEID)"),
        ({"SLURM_NODEID": "2"}, "hardware.nodes: 2, but NODE_RANK is '2'"),
        ({"NODE_RANK": "0"}, "hardware.nodes: MASTER_ADDR is not set; it is the address of the first node"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "x"}, "hardware.nodes: MASTER_PORT is 'x'"),
    ],
)
def test_a_node_that_is_not_told_its_place_is_one_line(lrk, monkeypatch, variables, message):
    for name in ("NODE_RANK", "SLURM_NODEID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert one_line(lrk("train", "hardware.nodes=2")).startswith(message)
    assert not runs()


def test_recipes_run_on_one_node(lrk):
    assert "lrk run runs on one; start its stage" in one_line(lrk("run", "recipe=milora", "hardware.nodes=2"))
