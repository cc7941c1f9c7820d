"""DoRA: magnitude and direction of each row of V = W + s · BA, against the plain formula and the PEFT library."""

import json
from copy import deepcopy

import pytest
import small
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.kinds.dora import Decomposed
from lowrank_cli.adapter.linear import AdaptedLinear

IN, OUT, RANK, ALPHA = 6, 5, 3, 4.0


def adapted_linear(base=None, *, dropout=0.0):
    """A linear with one decomposed module that has moved away from its start."""
    torch.manual_seed(1)
    linear, part = AdaptedLinear(base or nn.Linear(IN, OUT)), Decomposed(IN, OUT, RANK, ALPHA, dropout)
    linear.base.requires_grad_(False)
    linear.add("whole", part, None)
    with torch.no_grad():
        part.lora_b.normal_()
        part.magnitude.mul_(torch.rand(OUT) + 0.5)
    return linear.eval(), part


def plain(linear, part, x, rank_gate=None):
    """y = (m / ‖V‖) ⊙ (V x) + bias by forming V; the norm carries no gradient."""
    b = part.lora_b if rank_gate is None else part.lora_b * rank_gate
    v = linear.rows(None) + part.scale * b @ part.lora_a
    y = part.magnitude / v.detach().norm(dim=1) * (x @ v.T)
    return y if linear.base.bias is None else y + linear.base.bias


def bases():
    return [nn.Linear(IN, OUT), nn.Linear(IN, OUT, bias=False), Conv1D(OUT, IN)]


@pytest.mark.parametrize("base", bases(), ids=["bias", "no_bias", "conv1d"])
def test_output_and_gradients_are_those_of_the_plain_formula(base):
    linear, part = adapted_linear(base)
    x = torch.randn(4, 7, IN, requires_grad=True)
    leaves = [x, part.lora_a, part.lora_b, part.magnitude]
    ours, expected = linear(x), plain(linear, part, x)
    torch.testing.assert_close(ours, expected)
    found, wanted = (torch.autograd.grad(y.sin().sum(), leaves) for y in (ours, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected)


def test_norms_by_the_gram_identity_equal_those_of_the_formed_matrix():
    linear, part = adapted_linear(nn.Linear(IN, OUT))
    v = linear.rows(None) + part.scale * part.lora_b @ part.lora_a
    torch.testing.assert_close(part.norms(), v.detach().norm(dim=1))
    part.rank_gate = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(part.norms()[1], linear.rows(None).norm(dim=1))


def test_a_row_of_zeros_and_a_row_that_cancels_stay_finite():
    linear, part = adapted_linear()
    with torch.no_grad():
        linear.base.weight[0] = 0
        part.lora_b[0] = 0
        part.attach(linear.base.weight, linear.base.bias)
        x = torch.randn(2, 3, IN)
        assert torch.equal(linear(x)[..., 0], linear.base(x)[..., 0])
        part.lora_a[0], part.lora_b[1] = linear.base.weight[1], torch.tensor([-1 / part.scale, 0, 0])
        assert linear(x).isfinite().all()


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("base", bases(), ids=["bias", "no_bias", "conv1d"])
def test_module_gates_weigh_the_whole_update(base, tokens):
    linear, part = adapted_linear(base)
    x = torch.randn(3, 4, IN)
    gate = torch.rand(3, 4) if tokens else torch.tensor([0.0, 1.0, 2.0])
    part.module_gate = gate
    frozen = linear.base(x)
    expected = frozen + gate.reshape(3, -1, 1) * (plain(linear, part, x) - frozen)
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(linear(x)[gate == 0], frozen[gate == 0], atol=0, rtol=0)


def test_rank_gates_leave_out_ranks_also_in_the_norm_and_row_by_row():
    linear, part = adapted_linear()
    x = torch.randn(4, 7, IN)
    gates = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    part.rank_gate = gates
    together = linear(x)
    for row in range(4):
        part.rank_gate = gates[row]
        expected = plain(linear, part, x[row], gates[row])
        torch.testing.assert_close(linear(x)[row], expected)
        torch.testing.assert_close(together[row], expected)
    part.rank_gate, part.module_gate = gates, torch.tensor([1.0, 0.0, 2.0, 0.5])
    frozen, weights = linear.base(x), part.module_gate.reshape(4, 1, 1)
    torch.testing.assert_close(linear(x), frozen + weights * (together - frozen))


def test_dropout_reaches_the_low_rank_part_only():
    linear, part = adapted_linear(dropout=0.5)
    x = torch.ones(1, 20000, IN)
    exact = linear(x)
    part.train()
    noisy = linear(x)
    assert noisy.std(dim=1).min() > 0
    torch.testing.assert_close(noisy.mean(dim=1), exact.mean(dim=1), atol=0.1, rtol=0.05)
    with torch.no_grad():
        part.lora_b.zero_()
    # The frozen output is not dropped: its rows differ by no more than rounding.
    torch.testing.assert_close(linear(x).std(dim=1), torch.zeros(1, OUT), atol=1e-6, rtol=0)


def test_norms_are_kept_in_evaluation_until_a_parameter_changes(monkeypatch):
    linear, part = adapted_linear()
    x, calls, norms = torch.randn(2, 3, IN), [], Decomposed.norms
    monkeypatch.setattr(Decomposed, "norms", lambda part: calls.append(1) or norms(part))

    def check(count):
        with torch.no_grad():
            torch.testing.assert_close(linear(x), plain(linear, part, x))
        assert len(calls) == count

    check(1)
    check(1)
    for count, parameter in enumerate((part.lora_a, part.lora_b, part.magnitude), start=2):
        with torch.no_grad():
            parameter.mul_(1.5)
        check(count)
    part.lora_b.grad = torch.ones_like(part.lora_b)
    torch.optim.AdamW([part.lora_b], lr=0.1).step()
    check(5)
    part.lora_b.data = part.lora_b.data * 2
    check(6)
    linear.train()
    linear(x).sum().backward()
    part.lora_b.data.mul_(2)  # leaves no trace, but training forgets what was kept
    linear.eval()
    check(8)
    part.rank_gate = torch.zeros(RANK)
    with torch.no_grad():
        linear(x)
    part.rank_gate = None
    check(9)


@pytest.mark.parametrize("base", bases(), ids=["bias", "no_bias", "conv1d"])
def test_it_moves_with_its_model(base):
    linear, part = adapted_linear(base)
    x = torch.randn(2, 3, IN)
    expected = linear(x)
    copy = deepcopy(linear)
    linear.to(torch.float64)
    assert linear(x.double()).dtype == part.norms().dtype == torch.float64
    torch.testing.assert_close(linear(x.double()).float(), expected)
    assert torch.equal(copy(x), expected)
    copy.to("meta")
    reads = [
        *copy.low_rank["whole"].frozen(),
        copy.low_rank["whole"].squares,
        *copy.low_rank["whole"].tensors().values(),
    ]
    assert all(tensor.is_meta for tensor in reads if tensor is not None)


@pytest.mark.parametrize("family", small.FAMILIES)
def test_a_fresh_adapter_changes_no_bit_of_any_family(family):
    before = small.model(family)(input_ids=small.ids()).logits
    adapter = small.adapted("dora", family, trained=False)
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, before)
    with torch.no_grad():
        assert torch.equal(adapter.model(input_ids=small.ids()).logits, before)


@pytest.mark.parametrize("family", small.FAMILIES)
def test_merge_is_the_same_function_and_unmerge_restores_it(family):
    adapter = small.adapted("dora", family)
    logits = adapter.model(input_ids=small.ids()).logits
    adapter.merge()
    torch.testing.assert_close(adapter.model(input_ids=small.ids()).logits, logits, atol=1e-5, rtol=1e-4)
    adapter.unmerge()
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_computes_close_to_fp32_with_gradients_in_fp32(family, autocast):
    exact = small.adapted("dora", family)
    expected = exact.model(input_ids=small.ids()).logits
    model = small.model(family) if autocast else small.model(family).to(torch.bfloat16)
    before = model(input_ids=small.ids()).logits
    adapter = small.method("dora").adapt(model)
    if not autocast and family != "bert":  # whose head moves to fp32
        assert torch.equal(model(input_ids=small.ids()).logits, before)
    with torch.no_grad():
        for key, parameter in adapter.trained.items():
            parameter.copy_(exact.trained[key])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=small.ids()).logits
    logits.float().square().mean().backward()
    assert (logits.float() - expected).abs().max() / expected.abs().max() < 0.05
    for part in adapter.modules.values():
        assert {p.grad.dtype for p in part.tensors().values()} == {torch.float32}
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in part.tensors().values())


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_saving_and_loading_is_exact_and_says_whether_peft_can_read_it(tmp_path, family):
    adapter = small.adapted("dora", family)
    save_load.save(adapter, tmp_path, {})
    fresh = small.adapted("dora", family, trained=False)
    save_load.load(fresh, tmp_path)
    assert torch.equal(fresh.model(input_ids=small.ids()).logits, adapter.model(input_ids=small.ids()).logits)
    assert (tmp_path / save_load.CONFIG).exists() == (family != "gpt2")
    if family != "gpt2":
        assert json.loads((tmp_path / save_load.CONFIG).read_text())["use_dora"] is True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "qwen2", "bert"])
def test_the_peft_library_loads_it_with_equal_logits_and_gradients(tmp_path, family):
    peft = pytest.importorskip("peft")
    adapter = small.adapted("dora", family)
    save_load.save(adapter, tmp_path, {})
    theirs = peft.PeftModel.from_pretrained(small.model(family), tmp_path, is_trainable=True).eval()
    ids = small.ids()
    expected, logits = theirs(input_ids=ids).logits, adapter.model(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    expected.sin().sum().backward()
    logits.sin().sum().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in adapter.trained.items():
        name = f"base_model.model.{name}" + (".weight" if name.endswith("vector") else "")
        if "lora" in name:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=name)
