"""hardware.prepack: packed weights give the same outputs, follow the weights, and change nothing else."""

from __future__ import annotations

import copy

import pytest
import small
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from lowrank_cli.adapter.adapted_model import fingerprint
from lowrank_cli.adapter.module_copy import copied
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.errors import UserError
from lowrank_cli.models import prepack as module
from lowrank_cli.models.prepack import PrepackedLinear, free_memory, prepack, prepack_for
from lowrank_cli.schema import HardwareConfig

EQUAL = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def products(monkeypatch):
    """How often a packed weight was multiplied with."""
    seen, op = [], torch.ops.mkldnn._linear_pointwise

    class Watched:
        _linear_pointwise = staticmethod(lambda *args: seen.append(args[0].shape) or op(*args))
        _reorder_linear_weight = torch.ops.mkldnn._reorder_linear_weight

    monkeypatch.setattr(torch.ops, "mkldnn", Watched)
    return seen


def packed(model):
    """``model``, frozen, with packed weights."""
    prepack(model)
    return model.requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "bert"])
def test_outputs_are_equal(family, products):
    plain, model, ids = small.model(family), packed(small.model(family)), small.ids(3)
    assert fingerprint(model) == fingerprint(plain)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, **EQUAL)
        count = len(products)
        assert count > 6
        if family != "bert":
            torch.testing.assert_close(
                model.generate(ids[:1], max_new_tokens=4, do_sample=False),
                plain.generate(ids[:1], max_new_tokens=4, do_sample=False),
            )
    model.requires_grad_(True)
    before = len(products)
    model(input_ids=ids).logits.sum().backward()
    assert len(products) == before, "gradients are those of the plain weight"
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "layers.0" in name)


@pytest.mark.parametrize("name", small.TRAINABLE)
def test_every_method_computes_the_same_on_packed_weights(name, monkeypatch, products):
    plain, make = small.adapted(name), small.model
    monkeypatch.setattr(small, "model", lambda family: packed(make(family)))
    adapter, ids = small.adapted(name), small.ids(3)
    with torch.no_grad():
        torch.testing.assert_close(adapter.model(input_ids=ids).logits, plain.model(input_ids=ids).logits, **EQUAL)
    assert products or not adapter.linears, "weights that train are not packed"


def test_a_changed_weight_is_packed_again():
    model, ids = packed(small.model()), small.ids(3)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for parameter in model.model.layers[0].parameters():
            parameter.mul_(1.5)
        plain = small.model()
        plain.load_state_dict(model.state_dict())
        after = model(input_ids=ids).logits
        torch.testing.assert_close(after, plain(input_ids=ids).logits, **EQUAL)
        assert not torch.allclose(before, after, atol=1e-3)
        model.model.layers[0].mlp.up_proj.weight.data = torch.zeros_like(model.model.layers[0].mlp.up_proj.weight)
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, **EQUAL)


def test_a_trained_weight_is_followed_step_by_step():
    linear, x = PrepackedLinear(torch.nn.Linear(6, 5)), torch.randn(8, 6)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(linear(x), x @ linear.weight.t() + linear.bias)
        linear(x).sum().backward()
        optimizer.step()


def test_copies_that_share_the_weights_share_what_is_packed():
    model = packed(small.model())
    with torch.no_grad():
        model(input_ids=small.ids(3))
    first, other = model.lm_head, copied(model).lm_head
    assert isinstance(other, PrepackedLinear) and other is not first and other.joint.packed is first.joint.packed
    own = copy.deepcopy(model)
    with torch.no_grad():
        own.lm_head.weight.zero_()
        assert own(input_ids=small.ids(3)).logits.abs().max() == 0
        assert model(input_ids=small.ids(3)).logits.abs().max() > 0


def gemma3():
    torch.manual_seed(7)
    return Gemma3ForCausalLM(Gemma3TextConfig(**small.GATED, head_dim=8, sliding_window=4)).eval()


@pytest.mark.parametrize("make", [small.model, gemma3, lambda: small.model("gpt2")], ids=["llama", "gemma3", "gpt2"])
def test_generated_logits_are_equal(make):
    found = []
    for model in (make(), packed(make())):
        found.append(small.generated_logits(model, small.ids(4)))
    torch.testing.assert_close(found[1], found[0], **EQUAL)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["q_proj k_proj v_proj", "gate_proj up_proj"]),
        ("opt", ["q_proj k_proj v_proj"]),
        ("bert", ["query key value"]),
        ("gpt2", []),
    ],
)
def test_linears_that_read_one_input_are_found(family, expected):
    model = small.model(family)
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    found = [" ".join(names[linear] for linear in group) for group in module.same_input(model)]
    assert found == expected * 2, "of two layers"
    assert not any(child._forward_pre_hooks for child in model.modules())


def test_linears_that_read_one_input_are_multiplied_once(products):
    plain, model = small.model("qwen2").model.layers[0], packed(small.model("qwen2")).model.layers[0]
    names = ("q_proj", "k_proj", "v_proj")  # with biases

    def outputs(layer, *inputs):
        return [getattr(layer.self_attn, name)(x) for name, x in zip(names, inputs, strict=True)]

    with torch.no_grad():
        for unlike, expected in ((lambda x: x, 1), (torch.clone, 3), (torch.neg, 3)):
            x, before = torch.randn(4, 1, 32), len(products)
            inputs = (x, unlike(x), x)
            torch.testing.assert_close(outputs(model, *inputs), outputs(plain, *inputs), **EQUAL)
            assert len(products) - before == expected
        model.self_attn.q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(model.self_attn.k_proj(x), plain.self_attn.k_proj(x), **EQUAL)
        for layer in (model, plain):
            layer.self_attn.v_proj.bias.add_(1)
        torch.testing.assert_close(outputs(model, x, x, x), outputs(plain, x, x, x), **EQUAL)
    model.self_attn.k_proj.weight.requires_grad_(True)
    before = len(products)
    with torch.no_grad():
        model.self_attn.q_proj(x)
    assert len(products) == before, "a weight beside it trains"


def test_a_bank_on_packed_weights_computes_the_same(products):
    names, logits = ["a", None, "a"], []
    for model in (small.model(), packed(small.model())):
        bank = Bank(model)
        bank.add("a", small.adapted("lora"))
        with bank.batch(names), torch.no_grad():
            logits.append(model(input_ids=small.ids(len(names))).logits)
    torch.testing.assert_close(logits[1], logits[0], **EQUAL)
    assert products


def test_weights_in_use_move_to_huge_pages_once(monkeypatch):
    moved = []
    monkeypatch.setattr(module, "HUGE_PAGES_AFTER", 2)
    monkeypatch.setattr(module, "use_huge_pages", lambda weight, move=module.use_huge_pages: moved.append(move(weight)))
    linear, x = packed(torch.nn.Sequential(torch.nn.Linear(512, 2048))), torch.randn(8, 512)
    with torch.no_grad():
        for use in range(1, 5):
            torch.testing.assert_close(
                linear(x), torch.nn.functional.linear(x, linear[0].weight, linear[0].bias), **EQUAL
            )
            assert len(moved) == (use >= 2)


def test_it_is_refused_where_it_cannot_be(monkeypatch):
    settings = {"name": "x", "processes": 1, "threads": 1, "prepack": True}
    for device, precision in (("cuda", "fp32"), ("cpu", "bf16")):
        with pytest.raises(UserError, match=f"not {device} and {precision}"):
            HardwareConfig(device=device, precision=precision, **settings).validate()
    monkeypatch.setattr(module.torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"hardware\.prepack: true, but this build of torch has no oneDNN"):
        prepack(small.model())


def hardware(**changes) -> HardwareConfig:
    settings = {"name": "x", "device": "cpu", "precision": "fp32", "processes": 1, "threads": 1, "prepack": None}
    return HardwareConfig(**settings | changes)


def is_packed(model) -> bool:
    return any(isinstance(child, PrepackedLinear) for child in model.modules())


def test_weights_are_packed_for_generation_where_nothing_is_said(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda: 1e9)
    for settings, generates, expected in (
        (hardware(), True, True),
        (hardware(), False, False),
        (hardware(prepack=False), True, False),
        (hardware(prepack=True), False, True),
        (hardware(precision="bf16"), True, False),
        (hardware(precision="autocast"), True, False),
        (hardware(device="cuda"), True, False),
    ):
        model = small.model()
        assert prepack_for(model, settings, generates) == "", "so few bytes are not mentioned"
        assert is_packed(model) == expected
    monkeypatch.setattr(module, "MENTIONED", 0)
    assert prepack_for(small.model(), hardware(), True).startswith("weights packed for speed: 0.0 GB more memory")


def test_weights_are_not_packed_where_memory_is_short(monkeypatch):
    model = small.model()
    size = sum(child.weight.nbytes for child in model.modules() if isinstance(child, torch.nn.Linear))
    monkeypatch.setattr(module, "free_memory", lambda: 2 * size - 1)
    assert prepack_for(model, hardware(), True).startswith("weights are not packed: 0.0 GB more is over 50% of free")
    assert not is_packed(model)
    monkeypatch.setattr(module, "free_memory", lambda: 2 * size)
    assert prepack_for(model, hardware(), True) == "" and is_packed(model)


def test_free_memory_is_the_machines_or_what_the_control_group_leaves(tmp_path):
    meminfo = tmp_path / "meminfo"
    assert free_memory(meminfo, tmp_path) == 0
    meminfo.write_text("MemTotal:  9 kB\nMemAvailable:  4 kB\n")
    assert free_memory(meminfo, tmp_path) == 4096
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, expected in (("max", 4096), ("3000", 2000), ("500", 0)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert free_memory(meminfo, tmp_path) == expected


def test_one_row_is_packed_on_amd_only(monkeypatch, products):
    for name, rows in (("AMD EPYC", 1), ("Intel Xeon", 4)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"cpu_name": name})
        module.fewest_rows.cache_clear()
        linear, x = packed(torch.nn.Sequential(torch.nn.Linear(6, 5))), torch.randn(4, 6)
        with torch.no_grad():
            for count in range(1, 5):
                before = len(products)
                linear(x[:count])
                assert (len(products) > before) == (count >= rows)
    module.fewest_rows.cache_clear()
