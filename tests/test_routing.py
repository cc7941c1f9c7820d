"""MiLoRA's routing: the paper's formulas, once per prompt, reused with the KV cache."""

import gc
import math
import weakref
from itertools import pairwise

import pytest
import small
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from lowrank_cli.adapter import state
from lowrank_cli.adapter.kv_cache import pass_cache, returned_cache
from lowrank_cli.adapter.router import (
    ACTIVATIONS,
    GATES,
    POOLERS,
    Rational,
    Router,
    SelfAttentionPool,
    load_balance,
    scaled_gates,
    straight_through_gates,
)
from lowrank_cli.adapter.routing import PromptRouting
from lowrank_cli.errors import UserError
from lowrank_cli.methods import milora
from lowrank_cli.methods.protocol import Step
from lowrank_cli.stages.session import Session
from lowrank_cli.stages.train import Trainer

LAYERS = 2


def gelu_fit(numerator, denominator):
    """Residuals of a rational function of these orders against GeLU on [-3, 3], and the coefficients at the start."""
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    activation = Rational(numerator, denominator).double()

    def residuals(values):
        values = torch.tensor(values)
        above = sum(values[j] * grid**j for j in range(numerator + 1))
        below = 1 + sum(values[numerator + i] * grid**i for i in range(1, denominator + 1)).abs()
        return (above / below - F.gelu(grid)).numpy()

    start = torch.cat([activation.numerator, activation.denominator]).detach().numpy()
    torch.testing.assert_close(activation(grid), torch.tensor(residuals(start)) + F.gelu(grid))
    return residuals, start


@pytest.mark.parametrize(("orders", "error"), [((6, 5), 1.2e-4), ((4, 2), 2.4e-3), ((3, 2), 2e-2)])
def test_the_activation_starts_as_gelu_and_no_least_squares_step_improves_it(orders, error):
    from scipy.optimize import least_squares

    residuals, start = gelu_fit(*orders)
    assert abs(residuals(start)).max() < error
    best = least_squares(residuals, start, max_nfev=200)
    assert best.cost > 0.95 * 0.5 * (residuals(start) ** 2).sum()


@pytest.mark.parametrize("orders", [(6, 5), (8, 7), (4, 2)])
def test_what_symmetry_makes_zero_is_exactly_zero(orders):
    """A solver leaves rounding there, which is another one in each process: then no two runs would be the same."""
    m, n = orders
    _, start = gelu_fit(m, n)
    a, b = start[: m + 1], start[m + 1 :]
    assert not b[::2].any()
    assert a[1] == 0.5 and (a[3 : n + 2 : 2] == b[1::2] / 2).all()


def test_higher_orders_of_the_activation_fit_no_worse():
    costs = [[(gelu_fit(m, n)[0](gelu_fit(m, n)[1]) ** 2).sum() for n in range(2, m)] for m in range(3, 9)]
    for smaller, larger in pairwise(costs):
        assert all(two < 1.05 * one + 1e-9 for one, two in zip(smaller, larger, strict=False))
        assert all(two < 1.05 * one + 1e-9 for one, two in pairwise(larger))


def test_rational_is_the_papers_formula():
    activation = Rational()
    with torch.no_grad():
        activation.numerator.normal_()
        activation.denominator.normal_()
    x = torch.randn(4, 5)
    above = sum(activation.numerator[j] * x**j for j in range(7))
    below = 1 + sum(activation.denominator[i - 1] * x**i for i in range(1, 6)).abs()
    torch.testing.assert_close(activation(x), above / below, atol=1e-5, rtol=1e-4)


POOLED = {
    "self_attention": lambda hidden, pool: (hidden @ pool.weight).softmax(0) @ hidden,
    "average": lambda hidden, pool: hidden.mean(dim=0),
    "max": lambda hidden, pool: hidden.max(dim=0).values,
    "last_token": lambda hidden, pool: hidden[-1],
}


@pytest.mark.parametrize("name", POOLERS)
def test_poolers_see_the_prompt_only_whatever_stands_left_or_right_of_it(name):
    pool = POOLERS[name](8)
    if isinstance(pool, SelfAttentionPool):
        torch.nn.init.normal_(pool.weight)
    hidden = torch.randn(4, 6, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]]).bool()
    expected = torch.stack([POOLED[name](row[seen], pool) for row, seen in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(pool(hidden, mask), expected)
    changed = hidden.masked_fill(~mask.unsqueeze(-1), 1e4)
    torch.testing.assert_close(pool(changed, mask), expected)


def test_router_is_a_softmax_of_the_activated_pool():
    router = Router(8, 5)
    hidden, mask = torch.randn(3, 4, 8), torch.ones(3, 4).bool()
    pooled = router.pooler(hidden, mask)
    expected = (router.activation(pooled) @ router.projection.weight.T).softmax(-1)
    torch.testing.assert_close(router(hidden, mask), expected)
    router = Router(8, 5, POOLERS["max"](8), ACTIVATIONS["relu"])
    expected = (hidden.amax(dim=1).relu() @ router.projection.weight.T).softmax(-1)
    torch.testing.assert_close(router(hidden, mask), expected)


def test_the_names_in_the_schema_are_those_of_the_routers_pieces():
    assert tuple(POOLERS) == milora.POOLERS
    assert {"rational", *ACTIVATIONS} == set(milora.ACTIVATIONS)
    for gate in GATES:
        small.method("milora", gate=gate)


def test_gates_keep_k_and_sum_to_k():
    probabilities = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]])
    gates = scaled_gates(probabilities, 2)
    torch.testing.assert_close(gates, torch.tensor([[1.25, 0, 0.75, 0], [0, 0, 6 / 7, 8 / 7]]))
    torch.testing.assert_close(scaled_gates(torch.full((1, 7), 1 / 7), 7), torch.ones(1, 7))


def test_straight_through_gates_are_one_or_zero_with_the_gradient_of_the_probability():
    probabilities = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]], requires_grad=True)
    gates = straight_through_gates(probabilities, 2)
    assert gates.tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    upstream = torch.randn(2, 4)
    (gates * upstream).sum().backward()
    assert torch.equal(probabilities.grad, upstream * gates.detach())


def test_load_balance_is_one_when_even_and_larger_when_not():
    even = torch.eye(4) * 0.4 + 0.15
    assert load_balance(even).item() == pytest.approx(1)
    skewed = even[:1].expand(4, 4)
    assert load_balance(skewed).item() == pytest.approx(4 * 0.55)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("modules", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_modules_with_equal_weights_are_exactly_lora_or_dora(modules, gate, family):
    routed = small.adapted("milora", family, modules=modules, gate=gate, k=len(small.ROLES[family]))
    plain = small.adapted(modules, family)
    assert {type(part) for part in routed.modules.values()} == {type(part) for part in plain.modules.values()}
    with torch.no_grad():
        for router in routed.routing.routers:
            router.projection.weight.zero_()
        for name, parameter in plain.trained.items():
            parameter.copy_(routed.trained[name])
    torch.testing.assert_close(
        routed.model(input_ids=small.ids()).logits, plain.model(input_ids=small.ids()).logits, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_midora_is_the_bare_model_where_no_module_is_chosen_and_exact_at_the_start(family):
    before = small.model(family)(input_ids=small.ids()).logits
    fresh = small.adapted("milora", family, modules="dora", trained=False)
    assert torch.equal(fresh.model(input_ids=small.ids()).logits, before)
    adapter = small.adapted("milora", family, modules="dora")
    closed = torch.zeros(3, len(small.ROLES[family]))
    adapter.routing.choose = lambda probabilities, k: closed * probabilities
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_calls_each_router_once_a_prompt(family, beams):
    adapter = small.adapted("milora", family)
    adapter.model.generate(small.ids(3), max_new_tokens=6, num_beams=beams, do_sample=False)
    assert adapter.routing.routed == 3 * LAYERS
    adapter.model.generate(small.ids(2), max_new_tokens=6, num_beams=beams, do_sample=False)
    assert adapter.routing.routed == 5 * LAYERS


def gates_of(parts, rows):
    """(rows, N): a gate that all rows share is stored as one number."""
    return torch.stack([torch.as_tensor(part.module_gate).expand(rows) for part in parts], dim=1)


def test_rows_of_a_batch_are_routed_differently():
    adapter = small.adapted("milora")
    with torch.no_grad():
        adapter.model(input_ids=small.ids(8))
    gates = gates_of(adapter.routing.parts[1], 8)
    assert ((gates > 0).sum(dim=1) == 3).all()
    assert len({tuple(row) for row in (gates > 0).tolist()}) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("beams", [1, 3, 5])
def test_decoding_token_by_token_equals_the_full_forward(family, beams):
    decode_and_compare(small.adapted("milora", family), beams)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules": "dora"},
        {"pooler": "last_token", "activation": ["relu", "gelu"], "bilevel": False},
        {"pooler": "max", "gate": "straight_through", "k": 1},
        {"pooler": "average", "modules": "dora", "gate": "straight_through"},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_every_option_decodes_token_by_token_as_in_the_full_forward(settings):
    decode_and_compare(small.adapted("milora", **settings), 1)


def decode_and_compare(adapter, beams):
    """Prompts of different lengths, left padded in one batch, against each sequence alone in one pass."""
    model = adapter.model
    prompts = small.ids(3, 9)
    mask = torch.ones_like(prompts)
    for row, padding in enumerate((0, 3, 5)):
        prompts[row, :padding], mask[row, :padding] = 0, 0
    made = model.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=6,
        min_new_tokens=6,
        num_beams=beams,
        do_sample=False,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for row, padding in enumerate((0, 3, 5)):
        whole = made.sequences[row : row + 1, padding:]
        prompt_mask = (torch.arange(whole.shape[1]) < 9 - padding).long().unsqueeze(0)
        with torch.no_grad():
            logits = model(input_ids=whole, prompt_mask=prompt_mask).logits[0, 9 - padding - 1 : -1]
        for step, expected in enumerate(logits):
            beam = row if beams == 1 else int(made.beam_indices[row, step])
            torch.testing.assert_close(made.logits[step][beam], expected, atol=2e-5, rtol=1e-4)


def padded(rows):
    """Prompts of 9, 6 and 4 tokens, left padded in one batch, with their mask."""
    prompts = small.ids(rows, 9)
    mask = torch.ones_like(prompts)
    for row in range(rows):
        padding = (0, 3, 5)[row % 3]
        prompts[row, :padding], mask[row, :padding] = 0, 0
    return prompts, mask


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("search", [{"num_beams": 1}, {"num_beams": 5}, {"num_beams": 4, "num_return_sequences": 2}])
def test_rows_that_are_routed_differently_generate_what_each_does_alone(family, search):
    adapter = small.adapted("milora", family, k=2)
    prompts, mask = padded(6)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **search}
    together = adapter.model.generate(prompts, attention_mask=mask, **settings)
    copies = search.get("num_return_sequences", 1)
    chosen = gates_of(adapter.routing.parts[1], len(together) * search["num_beams"] // copies) > 0
    assert len({tuple(row) for row in chosen.tolist()}) > 1, "all rows are routed alike: the test would show nothing"
    for row, start in enumerate(9 - mask.sum(dim=1)):
        alone = adapter.model.generate(prompts[row : row + 1, start:], **settings)
        assert torch.equal(together[row * copies : (row + 1) * copies, 9:], alone[:, 9 - start :])


@pytest.mark.parametrize("pooler", ["self_attention", "average", "max", "last_token"])
def test_texts_of_different_lengths_in_one_batch_of_an_encoder_are_routed_as_alone(pooler):
    adapter = small.adapted("milora", "bert", k=2, pooler=pooler)
    texts, mask = padded(3)
    texts, mask = texts.flip(1), mask.flip(1)  # encoders are padded on the right
    with torch.no_grad():
        together = adapter.model(input_ids=texts, attention_mask=mask).logits
        for row, length in enumerate(mask.sum(dim=1)):
            alone = adapter.model(input_ids=texts[row : row + 1, :length]).logits
            torch.testing.assert_close(together[row : row + 1], alone, atol=2e-5, rtol=1e-4)


def test_sampled_sequences_of_a_prompt_share_its_routing():
    """Each of several samples is what the full forward pass makes likely: its logits, token by token, are the same."""
    adapter = small.adapted("milora", k=2)
    prompts, mask = padded(3)
    made = adapter.model.generate(
        prompts,
        attention_mask=mask,
        do_sample=True,
        num_return_sequences=4,
        max_new_tokens=5,
        min_new_tokens=5,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(made.sequences.unique(dim=0)) > 3
    assert adapter.routing.routed == 3 * LAYERS
    for row, sequence in enumerate(made.sequences):
        start = 9 - int(mask[row // 4].sum())
        prompt_mask = (torch.arange(14 - start) < 9 - start).long().unsqueeze(0)
        with torch.no_grad():
            logits = adapter.model(input_ids=sequence[None, start:], prompt_mask=prompt_mask).logits[0, 8 - start : -1]
        torch.testing.assert_close(torch.stack([step[row] for step in made.logits]), logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pooler", POOLERS)
def test_the_response_does_not_reach_the_router(pooler):
    adapter = small.adapted("milora", pooler=pooler)
    ids = small.ids(2, 9)
    prompt = torch.tensor([[1] * 5 + [0] * 4] * 2)
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 7) % small.VOCABULARY
    gates = []
    for tokens in (ids, other):
        adapter.model(input_ids=tokens, prompt_mask=prompt)
        gates.append(torch.stack([gates_of(layer, len(tokens)) for layer in adapter.routing.parts]))
    torch.testing.assert_close(gates[0], gates[1], atol=1e-6, rtol=0)


def test_modules_that_no_row_uses_are_skipped():
    adapter = small.adapted("milora", k=1)
    with torch.no_grad():
        adapter.model(input_ids=small.ids(1))
    for layer in adapter.routing.parts:
        assert sorted(part.skip for part in layer) == [False] + [True] * 6
    adapter.model(input_ids=small.ids(1))
    assert not any(part.skip for layer in adapter.routing.parts for part in layer), "training needs their gradients"


def test_skipped_modules_are_not_computed():
    adapter = small.adapted("milora", k=1)
    ids = small.ids(1)
    with torch.no_grad():
        expected = adapter.model(input_ids=ids).logits
        for part in adapter.modules.values():
            if part.skip:
                part.lora_b.fill_(math.nan)
        assert torch.equal(adapter.model(input_ids=ids).logits, expected)


def test_modules_stand_in_the_order_of_their_roles_however_targets_are_written():
    adapter = small.adapted("milora", target_modules=["model.layers.0.self_attn.v_proj", "Q", "V"], k=1)
    roles = {id(adapter.modules[site.key]): site.role for site in adapter.sites.values()}
    first, second = ([roles[id(part)] for part in layer] for layer in adapter.routing.parts)
    assert first == second


@pytest.mark.parametrize("modules", ["lora", "dora"])
@pytest.mark.parametrize(("gate", "k"), [("scaled", 3), ("straight_through", 3), ("straight_through", 1)])
def test_the_task_loss_reaches_every_router_parameter(modules, gate, k):
    adapter = small.adapted("milora", modules=modules, gate=gate, k=k)
    adapter.model(input_ids=small.ids(6)).logits.square().sum().backward()
    for router in adapter.routing.routers:
        for name, parameter in router.named_parameters():
            assert parameter.grad.abs().sum() > 0, name


def test_a_list_of_activations_is_shared_out_over_the_layers():
    adapter = small.adapted("milora", activation=["relu", "rational"])
    first, second = (router.activation for router in adapter.routing.routers)
    assert first is F.relu and isinstance(second, Rational)
    assert all(".layers.1.prompt_router.activation" in name for name in adapter.deferred)
    adapter = small.adapted("milora", activation=["gelu"], bilevel=False)
    assert [router.activation for router in adapter.routing.routers] == [F.gelu] * LAYERS


@pytest.mark.parametrize("gate", GATES)
def test_the_canary_sees_the_router_whatever_the_gate(gate, tmp_path):
    adapter = small.adapted("milora", gate=gate)
    state.save(adapter, tmp_path, {})
    with torch.no_grad():
        before = state.canary(adapter)[1]
        adapter.routing.routers[1].projection.weight.normal_(std=3.0)
        assert (state.canary(adapter)[1] - before).abs().max() > 1e-2 * before.abs().max()
    state.load(adapter, tmp_path)
    assert torch.equal(state.canary(adapter)[1], before)


def step(adapter, dev_loss):
    return Step(1, 10, adapter, 1e-3, dev_loss, lambda tensor: tensor)


def test_the_bilevel_step_moves_the_activations_by_dev_loss_and_nothing_else():
    method = small.method("milora", activation_learning_rate=0.01)
    adapter = method.adapt(small.model())
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_b.normal_()
    assert adapter.deferred == {name for name in adapter.trained if "numerator" in name or "denominator" in name}
    assert len(adapter.deferred) == 2 * LAYERS

    def dev_loss():
        return adapter.model(input_ids=small.ids(6)).logits.square().mean()

    before = {name: p.clone() for name, p in adapter.trained.items()}
    losses = [dev_loss().item()]
    for _ in range(10):
        method.after_step(step(adapter, dev_loss))
    losses.append(dev_loss().item())
    changed = {name for name, p in adapter.trained.items() if not torch.equal(p, before[name])}
    assert changed == adapter.deferred
    assert losses[1] < losses[0]
    assert all(p.grad is None for p in adapter.trained.values())


def test_a_constant_gate_costs_no_dev_pass():
    method = small.method("milora", k=1)
    adapter = method.adapt(small.model())
    method.after_step(step(adapter, lambda: pytest.fail("no dev loss was needed")))


def test_training_routes_by_prompts_and_steps_the_activations_on_dev(lrk, monkeypatch):
    train, dev, routed = set(), set(), []
    plain_batch, plain_dev, plain_model = Session.batch, Trainer._dev_batch_loss, PromptRouting._before_model

    def batch(session, encoded):
        made = plain_batch(session, encoded)
        assert (made["prompt_mask"].sum(1) < made["attention_mask"].sum(1)).all()
        if torch.is_grad_enabled():
            (dev if stepping else train).update(tuple(example.input_ids) for example in encoded)
        return made

    stepping = []

    def dev_loss(trainer, step):
        stepping.append(step)
        loss = plain_dev(trainer, step)
        stepping.clear()
        return loss

    def before(routing, model, args, kwargs):
        if torch.is_grad_enabled():
            routed.append("prompt_mask" in kwargs)
        return plain_model(routing, model, args, kwargs)

    monkeypatch.setattr(Session, "batch", batch)
    monkeypatch.setattr(Trainer, "_dev_batch_loss", dev_loss)
    monkeypatch.setattr(PromptRouting, "_before_model", before)
    assert lrk("train", "task.limit=24", "train.max_steps=2").code == 0
    assert routed and all(routed)
    assert dev and train and not dev & train


def test_without_the_bilevel_step_the_activations_train_with_the_rest():
    method = small.method("milora", bilevel=False)
    adapter = method.adapt(small.model())
    assert not adapter.deferred
    method.after_step(step(adapter, lambda: pytest.fail("no dev batch is needed")))


def test_the_second_optimizer_continues_where_it_was_saved():
    def run(method, adapter, steps):
        for _ in range(steps):
            method.after_step(step(adapter, lambda: adapter.model(input_ids=small.ids(4)).logits.square().mean()))

    whole, halves, resumed = (small.method("milora", activation_learning_rate=1e-3) for _ in range(3))
    adapter, other = whole.adapt(small.model()), halves.adapt(small.model())
    with torch.no_grad():
        for one, two in zip(adapter.trained.values(), other.trained.values(), strict=True):
            two.copy_(one.normal_(std=0.1))
    run(whole, adapter, 4)
    run(halves, other, 2)
    resumed.load_state(other, halves.state())
    run(resumed, other, 2)
    for name in adapter.deferred:
        assert torch.equal(adapter.trained[name], other.trained[name])


@pytest.mark.parametrize("modules", ["lora", "dora"])
def test_observations_count_the_modules_that_prompts_activate(modules):
    method = small.method("milora", k=2, modules=modules)
    adapter = method.adapt(small.model())
    assert method.observations(adapter, lambda counts: counts) == ({}, [])
    with torch.no_grad():
        adapter.model(input_ids=small.ids(5))
    metrics, (figure,) = method.observations(adapter, lambda counts: counts)
    shares = torch.tensor(figure["values"])
    assert shares.sum(dim=1).tolist() == pytest.approx([2.0] * LAYERS)
    sizes = torch.tensor([[sum(t.numel() for t in p.tensors().values()) for p in la] for la in adapter.routing.parts])
    routers = LAYERS * (32 + 12 + 32 * 7)
    assert metrics["activated_parameters"] == pytest.approx((shares * sizes).sum().item() + routers, abs=1)
    assert figure["columns"] == list("QKVOGUD")
    assert method.observations(adapter, lambda counts: counts) == ({}, []), "nothing since"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 8}, r"method.k: 8 is out of range \(allowed: 1 to 7\)"),
        ({"k": 0}, "method.k: 0"),
        ({"k": 3, "target_modules": ["Q", "V"]}, r"method.k: 3 is out of range \(allowed: 1 to 2\)"),
        ({"modules": "dor"}, "method.modules: unknown value 'dor'; did you mean 'dora'"),
        ({"pooler": "last"}, "method.pooler: unknown value 'last'"),
        ({"gate": "hard"}, "method.gate: unknown value 'hard'"),
        ({"activation": []}, "method.activation: the list is empty"),
        ({"activation": ["rational", "silu"]}, "method.activation: unknown value 'silu'"),
        (
            {"activation": ["relu", "gelu"]},
            r"method.bilevel: true, but method.activation=\['relu', 'gelu'\] has no coefficients",
        ),
        ({"activation": ["rational"] * 3}, "3 names cannot share 2 layers equally"),
        ({"numerator_order": 9}, r"method.numerator_order: 9 is out of range \(allowed: 3 to 8\)"),
        ({"denominator_order": 6}, r"method.denominator_order: 6 is out of range \(allowed: 2 to 5\)"),
        ({"target_modules": ["lm_head"], "k": 1}, "'lm_head' has no role in a layer"),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"], "k": 1}, "the same roles in every layer"),
    ],
)
def test_impossible_routings_are_errors(settings, message):
    with pytest.raises(UserError, match=message):
        small.adapted("milora", **settings)


def test_the_load_balance_loss_is_weighted_and_summed_over_layers():
    method = small.method("milora", load_balance=0.5)
    adapter = method.adapt(small.model())
    adapter.model(input_ids=small.ids(4))
    expected = 0.5 * sum(load_balance(p).item() for p in adapter.routing.probabilities)
    assert len(adapter.routing.probabilities) == LAYERS
    assert method.extra_loss(adapter).item() == pytest.approx(expected)
    assert math.isfinite(expected)


def prefilled(adapter, ids):
    """A KV cache that holds ``ids``."""
    with torch.no_grad():
        return returned_cache(adapter.model(input_ids=ids, use_cache=True))


def test_a_cache_continues_with_its_own_gates_after_the_adapter_was_off():
    adapter = small.adapted("milora")
    ids = small.ids(2, 6)
    with torch.no_grad():
        cache = prefilled(adapter, ids[:, :5])
        plain = adapter.model(input_ids=ids[:, 5:], **pass_cache(adapter.model, cache)).logits
        cache = prefilled(adapter, ids[:, :5])
        with adapter.disabled():
            adapter.model(input_ids=small.ids(2, 4))
        again = adapter.model(input_ids=ids[:, 5:], **pass_cache(adapter.model, cache)).logits
    torch.testing.assert_close(again, plain, atol=1e-6, rtol=0)


def test_a_cache_of_other_prompts_is_refused():
    adapter = small.adapted("milora")
    first, second = small.ids(4, 6).split(2)
    one, two = DynamicCache(config=adapter.model.config), DynamicCache(config=adapter.model.config)
    with torch.no_grad():
        adapter.model(input_ids=first, **pass_cache(adapter.model, one))
        adapter.model(input_ids=second, **pass_cache(adapter.model, two))
        with pytest.raises(AssertionError, match="belong to another KV cache"):
            adapter.model(input_ids=first[:, :1], **pass_cache(adapter.model, one))


def test_a_cache_that_the_model_made_itself_is_refused_for_other_prompts():
    adapter = small.adapted("milora")
    first, second = small.ids(4, 6).split(2)
    one = prefilled(adapter, first)
    prefilled(adapter, second)
    with torch.no_grad(), pytest.raises(AssertionError, match="belong to another KV cache"):
        adapter.model(input_ids=first[:, :1], **pass_cache(adapter.model, one))


def test_routing_does_not_keep_a_cache_alive():
    adapter = small.adapted("milora")
    cache = weakref.ref(prefilled(adapter, small.ids(2, 6)))
    gc.collect()
    assert cache() is None
