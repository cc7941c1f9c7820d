"""MiLoRA's routing: the paper's formulas, once per prompt, reused with the KV cache."""

import gc
import math
import weakref
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import DynamicCache

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.kv_cache import pass_cache, returned_cache
from lowrank_cli.adapter.routing.choice_stats import Choices
from lowrank_cli.adapter.routing.router import (
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
from lowrank_cli.errors import UserError
from lowrank_cli.methods import milora
from lowrank_cli.methods.protocol import Start, Step
from lowrank_cli.runs import Run
from lowrank_cli.session.session import Session
from lowrank_cli.stages.train import Trainer

LAYERS = 2


def gelu_fit(numerator, denominator):
    """Residuals of a rational function of these orders against GeLU on [-6, 6], and the coefficients at the start."""
    grid = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    activation = Rational(numerator, denominator).double()

    def residuals(values):
        values = torch.tensor(values)
        above = sum(values[j] * grid**j for j in range(numerator + 1))
        below = 1 + sum(values[numerator + i] * grid**i for i in range(1, denominator + 1)).abs()
        return (above / below - F.gelu(grid)).numpy()

    start = torch.cat([activation.numerator, activation.denominator]).detach().numpy()
    torch.testing.assert_close(activation(grid), torch.tensor(residuals(start)) + F.gelu(grid))
    return residuals, start


@pytest.mark.parametrize(("orders", "error"), [((6, 5), 4e-3), ((8, 7), 1.4e-3), ((4, 2), 0.12), ((3, 2), 0.12)])
def test_the_activation_starts_as_gelu_and_least_squares_hardly_improves_it(orders, error):
    """Among the functions x/2 + even part, whose numerator goes no higher than its denominator."""
    from scipy.optimize import least_squares

    (m, n), (residuals, start) = orders, gelu_fit(*orders)
    assert abs(residuals(start)).max() < error
    even = n - n % 2
    free = [*range(0, even + 1, 2), *range(m + 2, m + even + 1, 2)]  # a_0, a_2, … and b_2, b_4, …

    def of_free(values):
        whole = start.copy()
        whole[free] = values
        whole[3 : even + 2 : 2] = whole[m + 2 : m + even + 1 : 2] / 2
        return residuals(whole)

    best = least_squares(of_free, start[free], max_nfev=200)
    assert best.cost > 0.7 * 0.5 * (residuals(start) ** 2).sum()


@pytest.mark.parametrize("orders", [(6, 5), (8, 7), (5, 4), (4, 3), (3, 2), (8, 2)])
def test_the_activation_grows_linearly_outside_the_fit(orders):
    far = torch.tensor([-4e6, -2e6, -1e6, 1e6, 2e6, 4e6], dtype=torch.float64)
    values = Rational(*orders).double()(far)
    assert (values / far).tolist() == pytest.approx([0.5] * 6, rel=1e-3)


@pytest.mark.parametrize("orders", [(6, 5), (8, 7), (4, 2)])
def test_what_symmetry_makes_zero_is_exactly_zero(orders):
    """A solver leaves rounding there, which is another one in each process: then no two runs would be the same."""
    m, n = orders
    _, start = gelu_fit(m, n)
    a, b = start[: m + 1], start[m + 1 :]
    assert not b[::2].any() and not a[n - n % 2 + 2 :].any()
    assert a[1] == 0.5 and (a[3 : n + 2 : 2] == b[1::2] / 2).all()
    assert (b[1::2] > 0).all(), "the absolute value would bend it"


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
    hidden, scale = torch.randn(4, 6, 8), torch.rand(4, 6) + 0.5
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]]).bool()
    scaled = hidden * scale.unsqueeze(-1)
    expected = torch.stack([POOLED[name](row[seen], pool) for row, seen in zip(scaled, mask, strict=True)])
    torch.testing.assert_close(pool(hidden, mask, scale), expected)
    changed = hidden.masked_fill(~mask.unsqueeze(-1), 1e4)
    torch.testing.assert_close(pool(changed, mask, scale), expected)


def test_router_is_a_softmax_of_the_activated_pool():
    hidden, mask = torch.randn(3, 4, 8), torch.ones(3, 4).bool()
    router = Router(8, 5, standardized=False)
    expected = (router.activation(hidden.mean(dim=1)) @ router.projection.weight.T).softmax(-1)
    torch.testing.assert_close(router(hidden, mask), expected)
    router = Router(8, 5, POOLERS["max"](8), ACTIVATIONS["relu"], standardized=False)
    expected = (hidden.amax(dim=1).relu() @ router.projection.weight.T).softmax(-1)
    torch.testing.assert_close(router(hidden, mask), expected)


def test_a_standardized_router_sees_tokens_of_one_size_and_features_relative_to_what_is_usual():
    hidden, mask = torch.randn(3, 4, 8), torch.ones(3, 4).bool()
    router = Router(8, 5)
    router.standardize(mean := torch.randn(8), deviation := torch.rand(8) + 0.5)
    tokens = hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt()
    features = (tokens.mean(dim=1) - mean) / deviation
    expected = (router.activation(features) @ router.projection.weight.T).softmax(-1)
    torch.testing.assert_close(router(hidden, mask), expected)
    router.standardize(mean, torch.tensor([0.0] + [2.0] * 7))
    assert router.deviation.tolist() == pytest.approx([0.02] + [2.0] * 7), (
        "rounding of a constant feature must not rule"
    )


def prompt_states(prompts, width, scale, seed=0):
    """States of ``prompts`` as real decoders have them: alike but for a little, with three features a thousand times as
    large as the rest, which hardly differ."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=torch.Generator().manual_seed(1))
    own = 0.3 * torch.randn(prompts, 1, width, generator=draw) + 0.5 * torch.randn(prompts, 9, width, generator=draw)
    states = common + own  # (B, 9, D)
    states[..., :3] = 1e3 * (common[:3] + 0.01 * own[..., :3])
    return scale * states


@pytest.mark.parametrize("scale", [0.05, 1.0, 1e2, 1e5])
def test_routers_tell_prompts_apart_at_every_scale_of_the_states(scale):
    torch.manual_seed(0)
    router, mask = Router(256, 7), torch.ones(24, 9).bool()
    with torch.no_grad():
        seen = router.pool(prompt_states(48, 256, scale), torch.ones(48, 9).bool())
        router.standardize(seen.mean(dim=0), seen.std(dim=0))
        states = prompt_states(24, 256, scale, seed=1)
        choices = Choices(1, 7, 3)
        choices.add(0, router(states, mask))
        found = {name: values[0] for name, values in choices.by_layer().items()}
        assert found["distinct_sets"] >= 8 and found["set_entropy"] > 2.5
        assert found["largest_gate"] < 1.5 and not found["saturated"]
        torch.testing.assert_close(router(states, mask), router(states / scale, mask), atol=1e-4, rtol=1e-3)
        plain = Router(256, 7, standardized=False)
        choices.clear()
        choices.add(0, plain(states, mask))
        assert choices.by_layer()["distinct_sets"][0] <= 2, "as the states are, the outliers choose for all prompts"


def test_pooling_in_bf16_makes_no_fp32_copy_of_the_states():
    router = Router(64, 7)
    states = prompt_states(4, 64, 1.0).to(torch.bfloat16).requires_grad_()
    saved = []

    def note(tensor):
        saved.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        probabilities = router(states, torch.ones(4, 9).bool())
    assert not [dtype for dtype, size in saved if size >= states.numel() and dtype == torch.float32]
    probabilities[:, 0].sum().backward()
    assert states.grad.dtype == torch.bfloat16 and states.grad.abs().sum() > 0
    exact = router(states.detach().float(), torch.ones(4, 9).bool())
    torch.testing.assert_close(probabilities, exact, atol=5e-3, rtol=0)


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
    assert load_balance([even]).item() == pytest.approx(1)
    skewed = even[:1].expand(4, 4)
    assert load_balance([skewed]).item() == pytest.approx(4 * 0.55)


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
    gates = gates_of(adapter.routing.modules[1], 8)
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
    chosen = gates_of(adapter.routing.modules[1], len(together) * search["num_beams"] // copies) > 0
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
        gates.append(torch.stack([gates_of(layer, len(tokens)) for layer in adapter.routing.modules]))
    torch.testing.assert_close(gates[0], gates[1], atol=1e-6, rtol=0)


def test_modules_that_no_row_uses_are_skipped():
    adapter = small.adapted("milora", k=1)
    with torch.no_grad():
        adapter.model(input_ids=small.ids(1))
    for layer in adapter.routing.modules:
        assert sorted(part.skip for part in layer) == [False] + [True] * 6
    adapter.model(input_ids=small.ids(1))
    assert not any(part.skip for layer in adapter.routing.modules for part in layer), "training needs their gradients"


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
    first, second = ([roles[id(part)] for part in layer] for layer in adapter.routing.modules)
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
    save_load.save(adapter, tmp_path, {})
    with torch.no_grad():
        before = save_load.canary(adapter)[1]
        adapter.routing.routers[1].projection.weight.normal_(std=3.0)
        assert (save_load.canary(adapter)[1] - before).abs().max() > 1e-2 * before.abs().max()
    save_load.load(adapter, tmp_path)
    assert torch.equal(save_load.canary(adapter)[1], before)


def test_a_gate_that_underflows_still_counts_as_a_choice():
    choices = Choices(1, 3, 2)
    choices.add(0, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.7, 0.1]]))
    assert choices.prompts == 3
    assert choices.shares().sum().item() == pytest.approx(2)


def test_choices_tell_how_alike_and_how_decidedly_prompts_are_routed():
    choices = Choices(2, 3, 1)
    choices.add(0, torch.tensor([[0.95, 0.04, 0.01]] * 4))
    choices.add(1, torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.3, 0.5, 0.2], [0.2, 0.4, 0.3999]]))
    found = choices.by_layer()
    assert found["distinct_sets"] == [1, 2]
    assert found["set_entropy"] == pytest.approx([0.0, 1.0])
    assert found["saturated"] == [1, 0]
    assert found["tied"] == [0, 0.25]
    choices = Choices(1, 3, 2)
    choices.add(0, torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.45, 0.45]]))
    assert choices.by_layer()["largest_gate"] == pytest.approx([(4 / 3 + 1) / 2])


def prepared(method, adapter):
    """What ``method`` logs and says when it prepares on some prompts."""
    logged, said = [], []

    def read(count):
        with torch.no_grad():
            adapter.model(input_ids=small.ids(count))

    method.prepare(Start(adapter, read, lambda tensor: tensor, logged.append, said.append))
    return logged, said


def test_preparing_standardizes_what_every_router_pools_and_the_statistics_travel(tmp_path):
    method = small.method("milora")
    adapter = method.adapt(small.model())
    (row,), said = prepared(method, adapter)
    assert len(row["routing/distinct_sets"]) == LAYERS and not said
    with adapter.routing.pooling() as pooled, torch.no_grad():
        adapter.model(input_ids=small.ids(milora.PROMPTS))
    for router, (rows,) in zip(adapter.routing.routers, pooled, strict=True):
        features = (rows - router.mean) / router.deviation
        torch.testing.assert_close(features.mean(dim=0), torch.zeros(32), atol=1e-4, rtol=0)
        torch.testing.assert_close(features.std(dim=0, correction=0), torch.ones(32), atol=1e-4, rtol=0)
    save_load.save(adapter, tmp_path, {})
    other = small.method("milora").adapt(small.model())
    assert not torch.equal(other.routing.routers[1].mean, adapter.routing.routers[1].mean)
    save_load.load(other, tmp_path)
    for name, tensor in save_load.tensors(adapter).items():
        assert torch.equal(save_load.tensors(other)[name], tensor), name


def test_preparing_tells_of_a_routing_that_is_the_same_for_every_prompt():
    method = small.method("milora", standardize=False)
    adapter = method.adapt(small.model())
    with torch.no_grad():
        for router in adapter.routing.routers:
            router.projection.weight.zero_()
    _, (line,) = prepared(method, adapter)
    assert "48 training prompts: routing: the same modules for every prompt in 2 layers" in line
    assert "tied for most prompts in 2 layers" in line and line.endswith("try method.standardize=true")
    with torch.no_grad():
        for router in adapter.routing.routers:
            router.projection.weight.normal_(std=1e4)
    _, (line,) = prepared(method, adapter)
    assert "takes over 90 % of the probability for most prompts in 2 layers" in line


def test_a_routing_that_is_alike_for_every_prompt_is_told_at_the_start_and_at_the_end(lrk, monkeypatch):
    class Alike(Router):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            torch.nn.init.zeros_(self.projection.weight)

    monkeypatch.setattr("lowrank_cli.adapter.routing.router.Router", Alike)
    ended = lrk("train", "task.limit=24", "train.max_steps=1", "train.learning_rate=0")
    told = [line for line in ended.err.splitlines() if "the same modules for every prompt in 6 layers" in line]
    assert ended.code == 0 and len(told) == 2 and told[0].startswith("before the first step"), ended.err
    run = Run.open("outputs/latest")
    assert run.metrics["routing/distinct_sets"] == 1 and run.metrics["routing/same_layers"] == 6
    assert run.history()[0]["routing/distinct_sets"] == [1] * 6


def test_an_adapter_that_is_trained_on_keeps_its_statistics(lrk):
    steps = ["task.limit=24", "train.max_steps=1"]
    assert lrk("train", "task=tiny_yesno", *steps).code == 0
    first = Run.open("outputs/latest").path.resolve()
    assert lrk("train", f"run={first}", "task=tiny_sentiment", *steps).code == 0
    before, after = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, Path("outputs/latest"))
    )
    constants = [name for name in before if name.endswith(("prompt_router.mean", "prompt_router.deviation"))]
    assert len(constants) == 12
    for name in constants:
        assert before[name].std() > 0 and torch.equal(before[name], after[name]), name


def test_an_adapter_from_before_routers_were_standardized_computes_what_it_did(tmp_path):
    """Its saved values lack the keys that came later."""
    later = {"standardize", "router_learning_rate", "soft_start", "bilevel_every"}
    values = {key: value for key, value in vars(small.config("milora")).items() if key not in later}
    before = milora.MiLoRA(milora.MiLoRAConfig(**values))
    torch.manual_seed(3)
    adapter = before.adapt(small.model())
    assert not [name for name in save_load.tensors(adapter) if "mean" in name or "deviation" in name]
    save_load.save(adapter, tmp_path, {})
    save_load.load(milora.MiLoRA(milora.MiLoRAConfig(**values)).adapt(small.model()), tmp_path)
    with pytest.raises(UserError, match=r"lacks '.*prompt_router.deviation' \(4 tensors missing"):
        save_load.load(small.method("milora").adapt(small.model()), tmp_path)


def test_the_soft_start_trains_every_module_and_evaluates_with_k():
    method = small.method("milora", soft_start=0.5, bilevel=False)
    adapter = method.adapt(small.model())

    def active(grad):
        with torch.set_grad_enabled(grad):
            adapter.model(input_ids=small.ids(4))
        return {int(count) for layer in adapter.routing.modules for count in (gates_of(layer, 4) > 0).sum(dim=1)}

    for number in range(1, 5):
        assert active(grad=True) == {7} and active(grad=False) == {3}
        method.after_step(step(adapter, None, number))
    resumed = small.method("milora", soft_start=0.5, bilevel=False)
    assert active(grad=True) == {7}
    method.after_step(step(adapter, None, 5))
    assert active(grad=True) == {3}
    assert resumed.adapt(small.model()).routing.warming
    other = resumed.adapt(small.model())
    resumed.load_state(other, method.state())
    assert not other.routing.warming


def test_the_routers_own_learning_rate_is_theirs_alone():
    assert not small.method("milora").learning_rates(small.adapted("milora"), 1.0)
    method = small.method("milora", router_learning_rate=0.5)
    adapter = method.adapt(small.model())
    assert set(method.learning_rates(adapter, 1.0).values()) == {0.5}
    assert {name.rpartition("prompt_router.")[2] for name in method.learning_rates(adapter, 1.0)} == {
        "pooler.weight",
        "projection.weight",
    }


def test_training_gives_the_routers_their_own_learning_rate(lrk):
    assert lrk("train", "task.limit=24", "train.max_steps=2", "method.router_learning_rate=0").code == 0
    saved = load_file("outputs/latest/adapter/adapter_model.safetensors")
    assert not any(saved[name].any() for name in saved if name.endswith("prompt_router.pooler.weight"))
    assert any(saved[name].any() for name in saved if name.endswith("lora_B.weight"))


def step(adapter, dev_loss, number=1):
    return Step(number, 10, adapter, 1e-3, dev_loss, lambda tensor: tensor)


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


def test_the_bilevel_step_comes_as_often_as_it_is_asked_for():
    method, passes = small.method("milora", bilevel_every=3), []
    adapter = method.adapt(small.model())

    def dev_loss():
        passes.append(True)
        return adapter.model(input_ids=small.ids(2)).logits.square().mean()

    for number in range(1, 8):
        method.after_step(step(adapter, dev_loss, number))
        assert len(passes) == number // 3


def test_training_routes_by_prompts_and_steps_the_activations_on_dev(lrk, monkeypatch):
    train, dev, routed = set(), set(), []
    plain_batch, plain_dev, plain_loss = Session.batch, Trainer.dev_batch_loss, Session.loss_sum

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

    def loss_sum(session, model, batch):
        if torch.is_grad_enabled():
            routed.append("prompt_mask" in batch)
        return plain_loss(session, model, batch)

    monkeypatch.setattr(Session, "batch", batch)
    monkeypatch.setattr(Trainer, "dev_batch_loss", dev_loss)
    monkeypatch.setattr(Session, "loss_sum", loss_sum)
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
    metrics, (figure, sets) = method.observations(adapter, lambda counts: counts)
    gates = [gates_of(layer, 5) > 0 for layer in adapter.routing.modules]
    assert sets["values"][0] == [len(set(map(tuple, layer.tolist()))) for layer in gates]
    assert metrics["routing/distinct_sets"] == sum(sets["values"][0]) / LAYERS
    shares = torch.tensor(figure["values"])
    assert shares.sum(dim=1).tolist() == pytest.approx([2.0] * LAYERS)
    sizes = torch.tensor([[sum(t.numel() for t in p.tensors().values()) for p in la] for la in adapter.routing.modules])
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
    expected = 0.5 * sum(load_balance([p]).item() for p in adapter.routing.probabilities)
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
