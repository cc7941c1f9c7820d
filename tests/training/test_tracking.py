"""Trackers: what they get, that they change nothing, and the real libraries where these are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from command import FEW_STEPS, one_line
from resuming import history, train_broken_at
from safetensors.torch import load_file

from lowrank_cli.launch import single_run
from lowrank_cli.runs import Run, config_hash
from lowrank_cli.schema.train import TRACKERS
from lowrank_cli.training import tracking

QUICK = ["method=lora", *FEW_STEPS]


@pytest.fixture
def run() -> Run:
    config = {"seed": 0, "train": {"epochs": 2.0, "warmup": 0.1}, "task": {"label_words": ["no", "yes"]}}
    return Run.create(
        "outputs", stage="train", config=config, choices={"method": "lora"}, overrides=[], command="lrk train"
    )


class FakeTracker:
    """Records its calls; with ``broken``, logging fails."""

    def __init__(self, broken: bool = False):
        self.broken, self.calls = broken, []

    def store_init_configuration(self, values):
        self.calls.append(values)

    def log(self, values, step):
        print("on stdout")
        random.random(), numpy.random.rand(), torch.rand(1)
        if self.broken:
            raise ConnectionError("the server\nis down")
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finished")


@pytest.fixture
def fake(monkeypatch):
    """Puts a tracker in the place of W&B's; returns the ids of the runs that it was asked to continue."""
    asked = []

    def use(tracker: FakeTracker) -> list[str | None]:
        def start(run, earlier, step):
            asked.append(earlier)
            return tracker, "abc"

        monkeypatch.setattr(tracking, "require", lambda name: None)
        monkeypatch.setitem(tracking._STARTS, "wandb", start)
        return asked

    return use


def test_a_tracker_gets_configuration_history_and_final_metrics(run, fake):
    tracker = FakeTracker()
    asked = fake(tracker)
    with tracking.tracked(run, "wandb") as track_final:
        run.log({"step": 1, "train/loss": 0.5, "settled": True, "ranks": {"q": 8, "k": [1, "x"]}, "why": "text"})
        run.log({"step": 2, "why": "text"})
        track_final({"dev/loss": 0.25})
    run.log({"step": 3, "train/loss": 0.1})
    configuration = {
        "seed": 0,
        "train.epochs": 2.0,
        "train.warmup": 0.1,
        "task.label_words.0": "no",
        "task.label_words.1": "yes",
    }
    assert tracker.calls == [
        configuration,
        (1, {"train/loss": 0.5, "ranks/q": 8, "ranks/k/0": 1}),
        (2, {"final/dev/loss": 0.25}),
        "finished",
    ]
    tracker.calls.clear()
    with tracking.tracked(Run.open(run.path), "wandb"):
        pass
    assert (asked, tracker.calls) == ([None, "abc"], ["finished"])


def test_a_failing_tracker_leaves_the_run_alone(run, fake, capsys):
    tracker = FakeTracker(broken=True)
    fake(tracker)
    state = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with tracking.tracked(run, "wandb"):
        run.log({"step": 1, "train/loss": 0.5})
        run.log({"step": 2, "train/loss": 0.4})
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state
    assert len(run.history()) == 2 and len(tracker.calls) == 1
    said = capsys.readouterr()
    assert said.err == "warning: tracker=wandb: the server is down; the run goes on without it\n" and said.out == ""


def test_only_the_process_that_writes_tracks(run, fake):
    asked = fake(FakeTracker())
    with tracking.tracked(Run.open(run.path, writes=False), "wandb"), tracking.tracked(run, "none"):
        pass
    assert asked == [] and run.listeners == []


def test_a_users_variables_go_first(run, fake, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    monkeypatch.setitem(tracking._STARTS, "mlflow", lambda *_: seen.update(os.environ) or (FakeTracker(), "abc"))
    fake(FakeTracker())
    seen: dict[str, str] = {}
    with tracking.tracked(run, "mlflow"):
        assert seen["MLFLOW_TRACKING_URI"] == "http://localhost:1"
        assert "MLFLOW_ALLOW_FILE_STORE" not in seen and "MLFLOW_DISABLE_TELEMETRY" in seen
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with tracking.tracked(run, "mlflow"):
        assert seen["MLFLOW_TRACKING_URI"] == (run.path.absolute() / "mlruns").as_uri()
    assert not any(key.startswith("MLFLOW") for key in os.environ)


def test_a_missing_library_is_one_line(lrk, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = "tracker: wandb needs a library: pip install 'lowrank-cli[wandb]', or set tracker=none"
    assert one_line(lrk("train", "tracker=wandb")) == expected
    assert one_line(lrk("run", "recipe=milora", "tracker=wandb")).endswith(expected)
    assert "did you mean 'mlflow'" in one_line(lrk("train", "tracker=mlfow"))


def test_a_tracker_is_no_part_of_a_runs_identity():
    assert config_hash({"seed": 0, "tracker": "wandb"}) == config_hash({"seed": 0})


def _tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert all(len({event.step for event in rows}) == len(rows) for rows in scalars.values()), "a step is there twice"
    assert "seed: 0" in next(folder.glob("tensorboard/*/hparams.yml")).read_text()
    return {tag: {event.step: event.value for event in rows} for tag, rows in scalars.items()}


def _log_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: blocks of 32 KiB, each of chunks with checksum, length and kind; W&B's header."""
    at, record = 7, b""
    while at < len(data):
        if (left := -at % 32768) and left < 7:  # a block ends with less than a chunk's header
            at += left
        length, kind = struct.unpack_from("<4xHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield record
            record = b""


def _wandb(folder: Path) -> dict[str, dict[int, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, dict[int, float]] = {}
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # the id, before and after resuming
    for file in files:
        for record in map(Record.FromString, _log_records(file.read_bytes())):
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                found.setdefault(name, {})[record.history.step.num] = float(item.value_json)
    return found


def _mlflow(folder: Path) -> dict[str, dict[int, float]]:
    from mlflow import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = MlflowClient((folder / "mlruns").as_uri())
        experiment = client.get_experiment_by_name("lowrank-cli")
        (tracked,) = client.search_runs([experiment.experiment_id])
        assert tracked.data.params["train.max_steps"] == "6"
        names = tracked.data.metrics
        return {name: {m.step: m.value for m in client.get_metric_history(tracked.info.run_id, name)} for name in names}


def _trackio(folder: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    with sqlite3.connect(folder / "trackio" / "lowrank-cli.db") as database:
        for step, values in database.execute("select step, metrics from metrics order by id"):
            for name, value in json.loads(values).items():
                found.setdefault(name, {})[step] = value
    return found


READERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", TRACKERS[1:])
def test_a_real_tracker(name, monkeypatch):
    """A run that breaks and resumes: everything is in its folder, and the run is the same as without a tracker."""
    pytest.importorskip(name)
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    single_run.start("train", [*QUICK, "outputs=plain"], None, "lrk train")
    plain = Run.open(Path("plain/latest"))
    run = train_broken_at(4, [*QUICK, f"tracker={name}"])
    assert history(run) == history(plain)
    ours, theirs = (load_file(r.path / "adapter" / "adapter_model.safetensors") for r in (run, plain))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    seen = READERS[name](run.path.resolve())
    for key in ("train/loss", "dev/loss", "learning_rate"):
        logged = {row["step"]: row[key] for row in run.history() if key in row}
        assert seen[key] == pytest.approx(logged, rel=1e-6), key
    assert seen["final/test/accuracy"] == {6: pytest.approx(run.metrics["test/accuracy"])}
    outside = [file for file in Path("home").rglob("*") if file.is_file() and "matplotlib" not in file.parts]
    assert not outside, "written outside of the run folder"
    assert {path.name for path in Path().iterdir()} <= {"outputs", "plain", "home"}
