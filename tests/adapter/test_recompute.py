"""hardware.gradient_checkpointing: the same loss and gradients from less saved memory."""

import weakref
from pathlib import Path

import pytest
import small
import torch

from lowrank_cli.adapter.fused_autograd import Recompute, recompute_of
from lowrank_cli.adapter.training.recompute import GatedProduct, recompute
from lowrank_cli.bench.bench_models import BenchModel
from lowrank_cli.bench.train_step import saved_bytes
from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run
from lowrank_cli.methods.protocol import AddsLoss
from lowrank_cli.runs import Run

WAYS = ["feed_forward", "layers", "layers_offloaded"]
GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma"]


def passed(name, family, what, **settings):
    """Loss, gradients and saved bytes of one training pass."""
    method, adapter = small.method(name, **settings), small.adapted(name, family, **settings)
    recompute(adapter.model, what)
    adapter.model.train()
    torch.manual_seed(0)
    inputs = {"input_ids": small.ids()} | ({"labels": torch.tensor([0, 1, 0])} if "bert" in family else {})
    output = adapter.model(**inputs)
    loss = output.loss if "bert" in family else output.logits.square().mean()
    if isinstance(method, AddsLoss):
        loss = loss + method.extra_loss(adapter)
    loss.backward()
    found = {key: parameter.grad for key, parameter in adapter.trained.items()}
    return loss.detach(), found, adapter


def check(name, family, what, **settings):
    loss, gradients, _ = passed(name, family, what, **settings)
    expected, plain, _ = passed(name, family, "none", **settings)
    torch.testing.assert_close(loss, expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[key], msg=key)


@pytest.mark.parametrize("what", WAYS)
@pytest.mark.parametrize("name", small.TRAINABLE)
def test_gradients_are_the_same(name, what):
    check(name, "llama", what, **({"dropout": 0.3} if hasattr(small.config(name), "dropout") else {}))


@pytest.mark.parametrize("family", GATED[1:])
def test_the_feed_forward_of_every_gated_family(family):
    check("lora", family, "feed_forward")


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert"])
def test_the_layers_of_other_families(family):
    check("lora", family, "layers")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_the_inputs_of_layers_are_copied_and_nothing_else(monkeypatch, family):
    shapes, empty = [], torch.empty

    def noted(*sizes, **options):
        if "pin_memory" in options:
            shapes.extend(map(tuple, sizes))
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", noted)
    check("lora", family, "layers_offloaded")
    assert shapes == [(3, 9, 32)] * 2  # rows × tokens × width of each layer


def test_less_is_saved():
    ids = small.ids(4, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def saved(what):
        adapter = small.adapted()
        recompute(adapter.model, what)
        return saved_bytes(BenchModel(adapter.model.train()), batch)

    layers, feed_forward, nothing = saved("layers"), saved("feed_forward"), saved("none")
    assert layers < feed_forward
    features = 2 * 48 + 2 * 32  # activated and multiplied ones, and what two norms give
    assert nothing - feed_forward == 2 * 4 * 16 * features * 4  # layers × rows × tokens × features × bytes


def test_an_input_that_was_changed_in_place_is_not_computed_again():
    x = torch.randn(2, 5, 8)
    y = x * 2
    Recompute(lambda x: x * 2, (x,)).attach_to(y)
    assert recompute_of(y) is not None
    y.add_(1)
    assert recompute_of(y) is None


def test_nothing_of_a_pass_is_held_after_its_backward():
    adapter = small.adapted()
    recompute(adapter.model.train(), "feed_forward")
    features = []
    for layer in adapter.model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda *args: features.append(weakref.ref(args[-1].untyped_storage()))
        )
    loss = adapter.model(input_ids=small.ids(), labels=small.ids()).loss
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in adapter.trained.items()}
    loss.backward()
    for name, parameter in adapter.trained.items():
        torch.testing.assert_close(parameter.grad, 2 * first[name])
    assert [feature() for feature in features] == [None, None]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_the_product_has_the_right_gradient():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda gate, up: GatedProduct.apply(gate, up, torch.nn.functional.silu), (gate, up))


def test_a_family_without_a_gate_is_refused():
    with pytest.raises(UserError, match=r"hardware\.gradient_checkpointing: family 'gpt2' is not known to have"):
        recompute(small.model("gpt2"), "feed_forward")


def test_auto_saves_less_where_it_can():
    def changed(family, compiled=False):
        model = small.adapted("lora", family).model
        recompute(model, "auto", compiled)
        return any("forward" in vars(module) for module in model.modules())

    assert [changed(family) for family in ("llama", "gemma", "gpt2", "bert")] == [True, True, False, False]
    assert not changed("llama", compiled=True)


@pytest.mark.parametrize("what", ["feed_forward", "layers", "auto"])
def test_training_uses_it(what):
    quick = ["task=tiny_sentiment", "task.limit=8", "hardware.threads=1", "train.max_steps=2", "train.batch_size=4"]
    runs = []
    for value in ("none", what):
        single_run.start(
            "train", [*quick, "method=milora", f"hardware.gradient_checkpointing={value}"], None, "lrk train"
        )
        runs.append(Run.open(Path("outputs/latest").resolve()))
    assert runs[1].metrics["dev/loss"] == pytest.approx(runs[0].metrics["dev/loss"], rel=1e-5)
