"""Training passes: linears that read one input, as one function with a written backward, against the plain formula."""

import pytest
import small
import torch
from torch.nn import functional as F

from lowrank_cli.adapter import fused_autograd
from lowrank_cli.adapter.fused_autograd import STEPS, FusedLinears, dropout_mask
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.low_rank import LowRank
from lowrank_cli.adapter.spans import Span


def plain(x, mask, linear, updates, dtype=torch.float64):
    """The formula, product by product."""
    weight, bias = linear
    y, factor = x @ weight.t(), torch.ones(len(weight), dtype=dtype)
    for span, strength, a, b, gate, stretch in updates:
        h = (x if mask is None else x * mask) @ a.t()
        update = strength * (h if gate is None else h * gate) @ b.t()
        start, stop = (span.start, span.stop) if span else (0, len(weight))
        y = y + F.pad(update, (start, len(weight) - stop))
        if stretch is not None:
            factor = factor * F.pad(stretch - 1, (start, len(weight) - stop)).add(1)
    return y * factor if bias is None else y * factor + bias


def case(gates=False, stretched=False, masked=False):
    """Two linears, one with two spans, and all that they need, in double precision."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x = random(2, 3, 5)
    first, second = Span(0, 2), Span(3, 6)
    plan = (((None, 0.7),), ((first, 1.3), (second, 0.4)))
    shapes = [(4, 2, None), (6, 3, first), (6, 1, second)]
    tensors = [random(4, 5).detach(), random(4).detach()], [random(6, 5).detach(), None]
    for at, (outputs, rank, span) in enumerate(shapes):
        own = outputs if span is None else span.stop - span.start
        gate = [random(rank), random(2, 1, rank), random(2, 3, 1)][at] if gates else None
        tensors[int(at > 0)].extend([random(rank, 5), random(own, rank), gate, random(own) if stretched else None])
    mask = (torch.rand(2, 3, 5) > 0.3) if masked else None
    return x, mask, plan, [*tensors[0], *tensors[1]]


@pytest.mark.parametrize(
    "settings",
    [{}, {"gates": True}, {"stretched": True}, {"masked": True}, dict.fromkeys(("gates", "stretched", "masked"), True)],
)
def test_value_and_gradients_are_those_of_the_formula(settings):
    x, mask, plan, tensors = case(**settings)
    found = FusedLinears.apply(x, mask, plan, None, *tensors)
    first = plain(x, mask, tensors[:2], [(*plan[0][0], *tensors[2:6])])
    second = plain(x, mask, tensors[6:8], [(*plan[1][0], *tensors[8:12]), (*plan[1][1], *tensors[12:])])
    torch.testing.assert_close(found, (first, second))
    assert torch.autograd.gradcheck(
        lambda *given: FusedLinears.apply(given[0], mask, plan, None, *given[1:]), (x, *tensors)
    )


@pytest.mark.parametrize("masked", [False, True])
def test_where_no_a_takes_a_gradient_the_input_is_not_saved(masked):
    x, mask, plan, tensors = case(gates=True, masked=masked)
    for index in (2, 8, 12):  # A of each update
        tensors[index] = tensors[index].detach()
    found = FusedLinears.apply(x, mask, plan, None, *tensors)
    assert not any(saved is x for saved in found[0].grad_fn.saved_tensors)
    assert torch.autograd.gradcheck(
        lambda *given: FusedLinears.apply(given[0], mask, plan, None, *given[1:]), (x, *tensors)
    )
    tensors[12].requires_grad_()  # one is enough
    assert any(saved is x for saved in FusedLinears.apply(x, mask, plan, None, *tensors)[0].grad_fn.saved_tensors)


def test_a_second_derivative_is_refused():
    x, mask, plan, tensors = case()
    loss = FusedLinears.apply(x, mask, plan, None, *tensors)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_dropout_keeps_as_many_as_it_says(p):
    x = torch.randn(333, 301)
    mask, kept = dropout_mask(x, p)
    assert mask.shape == x.shape and abs(kept - (1 - p)) <= 0.5 / STEPS
    assert abs(mask.float().mean() - kept) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    torch.manual_seed(4)
    first = dropout_mask(x, p)[0]
    torch.manual_seed(4)
    assert torch.equal(first, dropout_mask(x, p)[0])


def test_the_mask_of_a_transposed_input_lies_row_by_row_on_every_device():
    for device in ("cpu", "meta"):
        mask, _ = dropout_mask(torch.empty(2, 5, 3, device=device).transpose(1, 2), 0.5)
        assert mask.view(-1, 5).shape == (6, 5)


def gradients(adapter, whole, monkeypatch):
    """Loss and gradients of a training pass, with the fused function or operation by operation."""
    with monkeypatch.context() as patch:
        if not whole:
            patch.setattr(AdaptedLinear, "fusible", lambda self, x: None)
        calls = []
        apply = FusedLinears.apply
        patch.setattr(FusedLinears, "apply", lambda *args: calls.append(args) or apply(*args))
        adapter.model.train()
        model = adapter.model
        model.zero_grad()
        torch.manual_seed(0)  # dropout of the model's own
        loss = model(input_ids=small.ids(), labels=small.ids()).loss
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in adapter.trained.items()}, len(calls)


def has_terms(linear):
    """Whether every update of ``linear`` is one that the function knows."""
    x = torch.zeros(1, 1, linear.rows(None).shape[1])
    return all(part.terms(x, x.dtype) is not None for part, _ in linear.updates)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("name", small.TRAINABLE)
def test_every_method_trains_through_it_and_gets_the_same_gradients(name, family, monkeypatch):
    adapter = small.adapted(name, family)
    whole = gradients(adapter, True, monkeypatch)
    steps = gradients(adapter, False, monkeypatch)
    groups = {
        linear.input_group for linear in adapter.linears.values() if has_terms(linear)
    }  # QKV, O, (G)U, D of a layer
    assert whole[2] == len(groups) and steps[2] == 0
    torch.testing.assert_close(whole[0], steps[0])
    assert whole[1].keys() == steps[1].keys()
    for key, gradient in whole[1].items():
        torch.testing.assert_close(gradient, steps[1][key], msg=key)


def siblings(**settings):
    """Query, key and value of a layer, and an input of theirs."""
    adapter = small.adapted(**settings)
    return [adapter.linears[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"], torch.randn(2, 4, 32)


def alone(linear, x):
    """What a linear gives where no gradient is recorded: nothing is shared there."""
    with torch.no_grad():
        return linear(x)


def test_an_output_is_its_own_linear_s_whoever_is_called_first_with_whatever_input():
    (query, key, value), x = siblings()
    other = torch.randn(3, 32)
    order = [(key, x), (query, other), (key, x), (key, x), (query, x), (value, other), (value, x), (query, x)]
    for linear, given in order:
        torch.testing.assert_close(linear(given), alone(linear, given))
    x.mul_(2)
    for linear in (query, key, value):
        torch.testing.assert_close(linear(x), alone(linear, x))


def test_a_sibling_that_is_switched_meanwhile_is_the_bare_linear():
    (query, key, value), x = siblings()
    query(x)
    next(iter(key.low_rank.values())).skip = True
    torch.testing.assert_close(key(x), key.base(x))
    value.enable(False)
    torch.testing.assert_close(value(x), value.base(x))
    torch.testing.assert_close(query(x), alone(query, x))


def test_a_frozen_weight_whose_gradient_is_asked_for_gets_it():
    (query, key, value), x = siblings()
    key.weight.requires_grad_(True)
    (query(x).sum() + key(x).sum() + value(x).sum()).backward()
    torch.testing.assert_close(key.weight.grad, x.sum(dim=tuple(range(x.ndim - 1))).expand_as(key.weight))


def test_a_frozen_bias_whose_gradient_is_asked_for_gets_it():
    linear = small.adapted(family="opt").linears["model.decoder.layers.0.self_attn.k_proj"]
    bias = linear.base.bias.requires_grad_(True)
    linear(torch.randn(2, 4, 32)).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 8.0))


def test_siblings_share_one_dropout_mask_and_keep_no_dropped_input(monkeypatch):
    (query, key, value), x = siblings(dropout=0.5)
    masks = []
    draw = fused_autograd.dropout_mask
    monkeypatch.setattr(fused_autograd, "dropout_mask", lambda *args: masks.append(draw(*args)) or masks[-1])
    found = [linear.train()(x) for linear in (query, key, value)]
    ((mask, kept),) = masks
    for linear, y in zip((query, key, value), found, strict=True):
        (part,) = linear.low_rank.values()
        expected = linear.base(x) + part.scale / kept * (x * mask) @ part.lora_a.t() @ part.lora_b.t()
        torch.testing.assert_close(y, expected)
    saved = {id(tensor): tensor for tensor in found[0].grad_fn.saved_tensors if tensor is not None}.values()
    assert sum(tensor.shape == x.shape and tensor.dtype == x.dtype for tensor in saved) == 1


def test_a_sibling_that_leaves_the_model_is_computed_no_more():
    adapter = small.adapted()
    site = adapter.sites["model.layers.0.self_attn.k_proj"]
    query, key = (adapter.linears[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    adapter.detach(site)
    assert key.input_group is not query.input_group and len(query.input_group.linears) == 2


@pytest.mark.parametrize("name", ["lora", "dora", "adalora"])
def test_autocast_computes_in_its_dtype(name):
    adapter = small.adapted(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapter.model(input_ids=small.ids(), labels=small.ids()).loss
    loss.backward()
    exact = small.adapted(name)
    exact.model(input_ids=small.ids(), labels=small.ids()).loss.backward()
    for key, parameter in adapter.trained.items():
        assert parameter.grad.dtype == torch.float32
        reference = exact.trained[key].grad
        assert (parameter.grad - reference).norm() <= 0.05 * reference.norm() + 1e-3, key


def test_a_kind_with_an_update_of_its_own_is_computed_as_it_says():
    class Doubled(LowRank):
        def add_to(self, y, x):
            super().add_to(y, x)
            super().add_to(y, x)

    linear = AdaptedLinear(torch.nn.Linear(6, 5))
    linear.add("whole", Doubled(6, 5, 2, 4.0, 0.0), None)
    (part,) = linear.low_rank.values()
    torch.nn.init.normal_(part.lora_b)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(linear(x), linear.base(x) + 2 * part.scale * x @ part.lora_a.t() @ part.lora_b.t())
