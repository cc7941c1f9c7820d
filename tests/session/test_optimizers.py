"""``train.optimizer``, ``train.schedule`` and LoRA+'s learning rates: equations, learning, resuming, refusals."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
from command import FEW_STEPS, one_line
from resuming import history, train_broken_at
from safetensors.torch import load_file

from lowrank_cli.config.composition import compose
from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run
from lowrank_cli.runs import Run
from lowrank_cli.schema.train import OPTIMIZER_LIBRARIES, OPTIMIZERS, TrainConfig
from lowrank_cli.session import optimizers

CONFIG = TrainConfig(
    learning_rate=1e-2, weight_decay=0.01, warmup=0.1, epochs=1.0, max_steps=None, batch_size=4, schedule="linear"
)


def installed(optimizer: str) -> bool:
    library = OPTIMIZER_LIBRARIES.get(optimizer, ("torch", ""))[0]
    return importlib.util.find_spec(library) is not None


each = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.skipif(not installed(n), reason="its library is optional")) for n in OPTIMIZERS],
)


@each
@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_optimizer_learns(name, method):
    method = small.method(method)
    adapter = method.adapt(small.model())
    optimizer = optimizers.create(replace(CONFIG, optimizer=name), adapter, {})
    rows = small.ids(4)
    losses = []
    for _ in range(12):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"]
        loss = adapter.model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@each
def test_a_broken_training_goes_on_bit_for_bit(name):
    overrides = ["method=lora", "method.b_learning_rate_ratio=4", f"train.optimizer={name}", *FEW_STEPS]
    single_run.start("train", overrides, None, "lrk train")
    whole = Run.open(Path("outputs/latest").resolve())
    broken = train_broken_at(4, overrides)
    assert history(broken) == history(whole)
    one, two = (load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (whole, broken))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_muon_steps_the_matrices_of_layers_and_adamw_the_rest():
    adapter = small.method("full").adapt(small.model("llama_classifier"))
    optimizer = optimizers.create(replace(CONFIG, optimizer="muon"), adapter, {})
    muon, adamw = optimizer.parts
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in adapter.trained.items()}
    (ours,), (others,) = ([{names[id(p)] for p in g["params"]} for g in part.param_groups] for part in (muon, adamw))
    assert {name for name in others if adapter.trained[name].dim() == 2} == {
        "model.embed_tokens.weight",
        "score.weight",
    }
    assert "model.layers.0.mlp.up_proj.weight" in ours and ours | others == adapter.trained.keys()


def test_entries_of_a_muon_step_are_one_learning_rate():
    adapter = small.adapted("lora")
    optimizer = optimizers.create(replace(CONFIG, optimizer="muon", weight_decay=0.0), adapter, {})
    matrix = next(p for name, p in adapter.trained.items() if name.endswith("up_proj.lora_A.weight"))
    before = matrix.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    matrix.grad = torch.linalg.qr(torch.randn(matrix.shape).T)[0].T.contiguous()  # singular values that agree
    optimizer.step()
    step = (matrix.detach() - before).square().mean().sqrt().item()
    assert step == pytest.approx(CONFIG.learning_rate, rel=0.35)  # five Newton-Schulz steps give 0.7 to 1.2, not 1


@pytest.mark.skipif(not installed("schedule_free"), reason="its library is optional")
def test_schedule_free_evaluates_the_average_and_trains_on_unchanged():
    adapter = small.adapted("lora")
    optimizer = optimizers.create(replace(CONFIG, optimizer="schedule_free"), adapter, {})
    parameters = list(adapter.trained.values())
    for _ in range(3):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
    before = [parameter.detach().clone() for parameter in parameters]
    with optimizers.evaluated_weights(optimizer):
        assert not any(torch.equal(a, b) for a, b in zip(before, parameters))
    assert all(torch.equal(a, b) for a, b in zip(before, parameters))
    optimizer.step()  # it knows that it is in training again


def shares(schedule: str, **settings) -> list[float]:
    config = replace(CONFIG, schedule=schedule, **settings)
    return [optimizers.share_of_peak(config, step, 20) for step in range(1, 21)]


def test_schedules():
    for schedule in ("linear", "cosine", "constant", "wsd"):
        rates = shares(schedule)
        assert rates[:2] == [0.5, 1.0] and max(rates) == 1.0  # two steps of warm-up
        assert rates[1:] == sorted(rates[1:], reverse=True)
    assert shares("linear")[-1] == pytest.approx(1 / 19)
    assert shares("cosine")[-1] < shares("linear")[-1] and shares("cosine")[3] > shares("linear")[3]
    assert set(shares("constant")[1:]) == {1.0}
    assert shares("wsd", decay=0.2)[15:] == pytest.approx([1.0, 4 / 5, 3 / 5, 2 / 5, 1 / 5])
    assert set(shares("wsd", decay=0.0)[1:]) == {1.0}


def test_the_schedule_of_an_optimizer():
    def composed(*overrides: str) -> str:
        return compose("train", ["method=lora", *overrides]).config.train.schedule

    assert composed() == "linear" and composed("train.schedule=wsd") == "wsd"
    assert composed("train.optimizer=schedule_free") == "constant"


def test_loraplus_trains_b_with_its_own_rate():
    method = small.method("lora", b_learning_rate_ratio=16)
    adapter = method.adapt(small.model())
    optimizer = optimizers.create(CONFIG, adapter, method.learning_rates(adapter, CONFIG.learning_rate))
    peaks = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    assert {peaks[id(p)] for name, p in adapter.trained.items() if "lora_A" in name} == {1e-2}
    assert {peaks[id(p)] for name, p in adapter.trained.items() if "lora_B" in name} == {0.16}


def test_rslora_scales_by_the_root_of_the_rank():
    modules = {
        s: next(iter(small.method("lora", rank=4, alpha=8, rslora=s).adapt(small.model()).modules.values()))
        for s in (True, False)
    }
    assert (modules[True].scale, modules[False].scale) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.optimizer=adam"], "unknown value 'adam'; did you mean 'adamw'?"),
        (["train.schedule=step"], "unknown value 'step' (allowed: linear, cosine"),
        (["train.optimizer=schedule_free", "train.schedule=cosine"], "averages instead (allowed: constant)"),
        (["train.optimizer=muon", "method=alora"], "muon, but method=alora moves ranks with their moments"),
        (["method.b_learning_rate_ratio=0"], "method.b_learning_rate_ratio: 0.0 must be above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(lrk, overrides, message):
    ended = lrk("check", "method=lora", *overrides)
    assert message in one_line(ended)


def test_a_missing_library_is_named(lrk, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    ended = lrk("check", "method=lora", "train.optimizer=adamw_8bit")
    assert ended.code == 2 and "pip install 'lowrank-cli[4bit]'" in ended.err


def test_warm_up_and_decay_fit_into_the_steps():
    with pytest.raises(UserError, match=r"train\.decay: 0\.2 and train\.warmup=0\.9 are more than all steps"):
        compose("train", ["train.schedule=wsd", "train.warmup=0.9"])
