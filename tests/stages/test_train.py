"""The training stage as users run it: resume bit for bit, data parallel, best adapter, early stop, honest failures."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from statistics import fmean

import pytest
import torch
from checkpoints import random_bert
from command import FEW_STEPS
from forked import Lrk, forked_workers
from safetensors.torch import load_file
from transformers import AutoConfig

from lowrank_cli.errors import Interrupted, UserError, WorkFailed
from lowrank_cli.launch import single_run
from lowrank_cli.methods.milora import MiLoRA
from lowrank_cli.models.load import BUNDLED
from lowrank_cli.runs import Run, stopping
from lowrank_cli.session.session import Session
from lowrank_cli.stages.train import Trainer

pytestmark = pytest.mark.slow
#: Two processes.
PARALLEL = [
    "method=milora",
    "method.activation_learning_rate=1e-3",
    "hardware.processes=2",
]


def train(*overrides: str, outputs="outputs") -> Run:
    """``lrk train`` in this process; the run that it made."""
    single_run.start("train", [*FEW_STEPS, f"outputs={outputs}", *overrides], None, "lrk train")
    return Run.open(Path(outputs) / "latest")


def losses(run: Run) -> list[dict]:
    """The history without what the clock wrote."""
    return [{k: v for k, v in row.items() if k != "train/seconds"} for row in run.history()]


def numbers(run: Run) -> dict[str, float]:
    """The metrics without what the clock wrote."""
    return {k: v for k, v in run.metrics.items() if "seconds" not in k and "per_second" not in k}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted MiLoRA run with dropout: router, second optimizer and random numbers all matter."""
    return train("method=milora", "method.dropout=0.1", outputs=tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An uninterrupted run of two processes."""
    with forked_workers():
        return train(*PARALLEL, outputs=tmp_path_factory.mktemp("pair"))


def test_a_run_leaves_everything_that_the_contract_names(whole):
    assert {"config.yaml", "run.json", "history.jsonl", "metrics.json", "predictions.jsonl", "adapter", "plots"} <= {
        path.name for path in whole.path.iterdir()
    }
    assert whole.info["status"] == "done"
    assert {"test/accuracy", "dev/accuracy", "dev/loss", "trainable_parameters", "activated_parameters"} <= set(
        whole.metrics
    )
    assert {path.name for path in (whole.path / "plots").iterdir()} == {
        "loss.png",
        "activated_modules.png",
        "sets_of_modules.png",
    }
    records = [json.loads(line) for line in (whole.path / "predictions.jsonl").read_text().splitlines()]
    right = sum(record["prediction"] in record["references"] for record in records)
    assert whole.metrics["test/accuracy"] == right / len(records) == fmean(record["correct"] for record in records)
    assert all(math.isfinite(row["train/loss"]) for row in whole.history() if "train/loss" in row)


def test_the_best_dev_adapter_is_kept_and_scored(whole):
    dev = {row["step"]: row["dev/loss"] for row in whole.history() if "dev/loss" in row}
    assert whole.metrics["dev/loss"] == min(dev.values())
    assert dev[whole.metrics["best_step"]] == min(dev.values())
    about = json.loads((whole.path / "adapter" / "lrk.json").read_text())["about"]
    assert about["step"] == whole.metrics["best_step"]


def test_without_the_test_split_a_run_trains_alike_and_measures_dev_alone(tmp_path, whole):
    run = train("method=milora", "method.dropout=0.1", "test=false", outputs=tmp_path)
    assert losses(run) == losses(whole)
    measured = numbers(run)
    assert not [name for name in measured if name.startswith("test/")]
    assert measured["dev/accuracy"] == numbers(whole)["dev/accuracy"]
    answers = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == measured["dev/examples"]
    assert fmean(answer["correct"] for answer in answers) == pytest.approx(measured["dev/accuracy"])
    assert run.info["config_hash"] == whole.info["config_hash"]  # it decides nothing that was learnt


def test_a_killed_run_resumes_bit_for_bit(pair):
    """Two processes, killed without warning after a checkpoint; then ``--resume``. One process: tests/reliability."""
    killed = started_until(5, *PARALLEL)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not Run.open("outputs/latest").done
    with forked_workers():
        resumed = resume()
    assert losses(resumed) == losses(pair)
    assert numbers(resumed) == numbers(pair)
    ours, theirs = (load_file(r.path / "adapter" / "adapter_model.safetensors") for r in (resumed, pair))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def started_until(step: int, *overrides: str) -> Lrk:
    """``lrk train`` in a process of its own, as soon as it has logged a step."""
    started, history = Lrk("train", *FEW_STEPS, *overrides), Path("outputs/latest/history.jsonl")
    limit = time.monotonic() + 240
    while not (history.exists() and f'"step": {step}' in history.read_text()):
        assert started.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < limit
        time.sleep(0.002)
    return started


def resume() -> Run:
    """``lrk train --resume outputs/latest`` in this process; its run."""
    run = Run.open(Path("outputs/latest").resolve())
    single_run.resume("train", str(run.path), [])
    return Run.open(run.path)


def test_two_processes_train_as_one(pair):
    """The same examples make each step, so only rounding may differ (Adam makes more of it than its size)."""
    alone = train(*PARALLEL[:-1])
    for ours, theirs in zip(losses(pair), losses(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():  # one for the run, or one for each layer
            assert value == pytest.approx(theirs[key], rel=1e-3), (key, ours["step"])
    assert pair.metrics["test/examples"] == alone.metrics["test/examples"] == 24
    first, second = ((run.path / "predictions.jsonl").read_text().splitlines() for run in (alone, pair))
    assert [json.loads(row)["prediction"] for row in first] == [json.loads(row)["prediction"] for row in second]


def test_accumulated_batches_make_the_same_step(tmp_path):
    """A step is the mean over its tokens, not over its micro-batches: answers here have two to four tokens."""
    uneven = ("method=lora", "task=tiny_instruct", "test=false")
    once = train(*uneven, outputs=tmp_path / "once")
    accumulated = train(*uneven, "train.gradient_accumulation=4", outputs=tmp_path / "accumulated")
    for ours, theirs in zip(losses(accumulated), losses(once), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_sigterm_saves_and_says_how_to_go_on(whole):
    started = started_until(3, "method=milora", "method.dropout=0.1")
    started.send_signal(signal.SIGTERM)
    assert started.wait() == 143
    assert Run.open("outputs/latest").info["status"] == "interrupted"
    assert "lrk train --resume outputs" in started.errors()
    assert losses(resume()) == losses(whole)


@pytest.mark.parametrize("forward", [1, 2])
def test_a_stop_during_an_evaluation_continues_with_it(monkeypatch, tmp_path, forward):
    """The second evaluation of the dev set, after step 4, in its first or last forward pass."""
    batch, loss_sum, passes = ["evaluate.batch_size=12"], Session.loss_sum, []

    def signalled(session, model, rows):
        if not model.training:
            passes.append(rows)
            if len(passes) == 2 + forward:
                os.kill(os.getpid(), signal.SIGTERM)
        return loss_sum(session, model, rows)

    expected = train("method=lora", *batch, outputs=tmp_path / "whole")
    monkeypatch.setattr(Session, "loss_sum", signalled)
    with stopping.signals(), pytest.raises(Interrupted):
        train("method=lora", *batch)
    run = Run.open("outputs/latest")
    assert len(passes) == 2 + forward and [row["step"] for row in run.history() if "dev/loss" in row] == [2]
    assert run.info["status"] == "interrupted" and os.listdir(run.path / "checkpoints") == ["step-0000004"]
    single_run.resume("train", str(run.path))
    resumed = Run.open(run.path)
    assert losses(resumed) == losses(expected) and numbers(resumed) == numbers(expected)


def test_a_stop_during_the_last_evaluation_repeats_no_step(monkeypatch, tmp_path):
    expected = train("method=lora", "train.max_steps=5", outputs=tmp_path / "whole")
    steps = []
    step = Trainer.take_step
    monkeypatch.setattr(Trainer, "take_step", lambda trainer, number: steps.append(number) or step(trainer, number))
    with monkeypatch.context() as patch, stopping.signals(), pytest.raises(Interrupted):
        patch.setattr("lowrank_cli.stages.train.evaluate_end", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        train("method=lora", "train.max_steps=5")
    single_run.resume("train", "outputs/latest")
    assert steps == [1, 2, 3, 4, 5] and numbers(Run.open("outputs/latest")) == numbers(expected)


def test_a_batch_of_a_mix_holds_several_of_its_tasks(monkeypatch):
    plain, parts = Trainer.take_step, []

    def step(trainer, number):
        parts.append({trainer.session.task.train[index].task for index in trainer.batches[number - 1]})
        return plain(trainer, number)

    monkeypatch.setattr(Trainer, "take_step", step)
    train("method=lora", "task=tiny_mix", "train.max_steps=3", "train.eval_every=3")
    assert all(len(tasks) > 1 for tasks in parts), parts


def test_training_stops_early_when_the_dev_loss_no_longer_falls():
    settings = ("train.learning_rate=0", "train.patience=2", "train.max_steps=50")
    run = train("method=lora", *settings)
    assert run.metrics["train/steps"] == 6  # the first evaluation is the best, two more are not
    assert run.metrics["best_step"] == 2
    first = train("method=lora", *settings, "train.eval_first=true")  # one more, before the first step
    assert first.metrics["train/steps"] == 4 and first.metrics["best_step"] == 0
    assert [row["step"] for row in first.history() if "dev/loss" in row] == [0, 2, 4]


def test_a_loss_that_is_not_finite_names_step_and_batch():
    with pytest.raises(WorkFailed, match=r"train/loss is nan at step \d+ \(training examples \d+, .*\)"):
        train("method=full", "train.learning_rate=1e30", "train.max_grad_norm=0", "train.eval_every=100")
    run = Run.open("outputs/latest")
    assert run.info["status"] == "failed"
    assert "train/loss is nan" in run.info["error"]


def test_an_evaluation_sees_what_the_last_step_wrote(monkeypatch):
    update, seen = Trainer.update, []

    def watched(trainer, step):
        trainer.dev_loss()  # what is kept here is of the weights before
        update(trainer, step)
        seen.append(trainer.dev_loss())
        torch.autograd.graph.increment_version(trainer.adapter.trained.values())  # as if all had been written again
        assert seen[-1] == trainer.dev_loss()

    monkeypatch.setattr(Trainer, "update", watched)
    train("method=dora", "train.max_steps=2", "train.learning_rate=1e-2")
    assert seen[0] != seen[1]


def test_the_learning_rate_warms_up_and_decays_linearly():
    run = train("method=lora", "train.max_steps=10", "train.warmup=0.2", "train.learning_rate=1.0", "task.limit=80")
    rates = [row["learning_rate"] for row in run.history() if "learning_rate" in row]
    assert rates == pytest.approx([0.5, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9])


def test_the_seed_decides_the_run(tmp_path):
    same = [losses(train("method=lora", outputs=tmp_path / name)) for name in "ab"]
    assert same[0] == same[1]
    assert losses(train("method=lora", "seed=1", outputs=tmp_path / "c")) != same[0]


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_other_precisions_train_and_evaluate(precision):
    run = train("method=milora", f"hardware.precision={precision}", "train.max_steps=2")
    single_run.start("evaluate", [f"run={run.path}", "hardware.threads=1"], None, "lrk evaluate")
    assert Run.open("outputs/latest").metrics["test/accuracy"] == run.metrics["test/accuracy"]


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/step-0000006/trained.safetensors"])
def test_an_altered_checkpoint_is_refused(tmp_path, whole, name):
    run = Run.open(shutil.copytree(whole.path, tmp_path / "copy"))
    run.update(status="failed")
    (run.path / "metrics.json").unlink()
    (run.path / name).write_bytes((run.path / name).read_bytes()[:-7])
    with pytest.raises(UserError, match=Path(name).name):
        single_run.resume("train", str(run.path))


def test_an_adapter_trained_in_bf16_is_evaluated_in_fp32():
    run = train("method=milora", "hardware.precision=bf16", "train.max_steps=2")
    single_run.start("evaluate", [f"run={run.path.resolve()}", "hardware.precision=fp32"], None, "lrk evaluate")
    assert Run.open("outputs/latest").done


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return random_bert(tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("method", ["lora", "milora", "full"])
def test_an_encoder_trains_with_what_its_checkpoint_lacks(encoder, method):
    run = train(f"method={method}", "model=minilm", f"model.path={encoder}", "seed=1", "train.learning_rate=1e-2")
    trained = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("bert.pooler.dense.weight") for name in trained)
    assert any(name.endswith("classifier.weight") for name in trained)
    history = [row["train/loss"] for row in run.history() if "train/loss" in row]
    assert history[-1] != history[0]
    single_run.start("evaluate", [f"run={run.path.resolve()}"], None, "lrk evaluate")
    again = Run.open("outputs/latest").metrics
    assert again["test/accuracy"] == run.metrics["test/accuracy"]
    assert again["activated_parameters"] <= again["trainable_parameters"] == run.metrics["trainable_parameters"]


@pytest.mark.parametrize(("task", "metric"), [("tiny_arithmetic", "number_match"), ("tiny_data2text", "bleu")])
def test_free_answers_are_generated_with_one_routing_a_prompt(task, metric, monkeypatch):
    counts = []
    observe = MiLoRA.observations

    def counting(method, adapter, add_up):
        counts.append(adapter.routing.routed)
        return observe(method, adapter, add_up)

    monkeypatch.setattr(MiLoRA, "observations", counting)
    run = train("method=milora", f"task={task}", "evaluate.num_beams=3", "train.max_steps=2", "task.limit=8")
    layers = AutoConfig.from_pretrained(BUNDLED).num_hidden_layers
    assert counts[-1] - counts[-2] == run.metrics["test/examples"] * layers
    assert f"test/{metric}" in run.metrics
    records = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    assert len(records) == run.metrics["test/examples"]


def test_demonstrations_change_what_the_frozen_model_answers():
    common = ["method=none", "task=tiny_sentiment", "task.limit=24", "hardware.threads=1"]
    scores = []
    for shots in (0, 8):
        single_run.start("evaluate", [*common, f"evaluate.shots={shots}"], None, "lrk evaluate")
        lines = (Path("outputs/latest") / "predictions.jsonl").read_text().splitlines()
        scores.append([json.loads(line)["scores"] for line in lines])
    assert len(scores[0]) == len(scores[1]) == 24
    assert all(zero != eight for zero, eight in zip(*scores, strict=True))
