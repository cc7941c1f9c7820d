"""The KV cache is found under any name, and nothing that continues one is taken for a new prompt."""

import pytest
import small
import torch
from torch import nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowrank_cli.adapter.kv_cache import (
    Growing,
    continued_cache,
    given_cache,
    growing_cache,
    pass_cache,
    returned_cache,
)
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.bench.bench_models import perturb


def filled(tokens=3):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, tokens, 2), torch.zeros(1, 1, tokens, 2), 0)
    return cache


@pytest.mark.parametrize("name", ["cache", "past_key_values", "a_name_of_tomorrow"])
def test_a_cache_is_found_under_any_name(name):
    cache = filled()
    assert given_cache((), {"input_ids": torch.zeros(1, 1), name: cache}) is cache
    assert continued_cache((), {name: cache}, 1) is cache


def test_a_cache_is_found_among_positional_arguments():
    cache = filled()
    assert continued_cache((torch.zeros(1, 1), None, cache), {}, 1) is cache


def test_an_empty_cache_starts_new_sequences():
    assert continued_cache((), {"cache": DynamicCache(), "attention_mask": torch.ones(2, 5)}, 5) is None
    assert continued_cache((), {"attention_mask": torch.ones(2, 5)}, 5) is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_of_an_unknown_kind_is_an_error(name):
    with pytest.raises(AssertionError, match=f"{name}: a tuple is no KV cache"):
        given_cache((), {name: ((torch.zeros(1), torch.zeros(1)),)})


def test_a_mask_over_more_than_the_new_tokens_needs_a_cache():
    with pytest.raises(AssertionError, match="covers 6 tokens, but the forward pass has 1"):
        continued_cache((), {"attention_mask": torch.ones(2, 6), "state": object()}, 1)


def test_a_routed_model_refuses_a_pass_that_hides_its_cache():
    adapter = small.adapted("milora")
    with torch.no_grad(), pytest.raises(AssertionError, match="no known KV cache"):
        adapter.model(input_ids=small.ids(2, 1), attention_mask=torch.ones(2, 6))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "mistral"])
def test_what_a_model_returns_can_be_passed_back(family):
    model = small.model(family).eval()
    ids = small.ids(2, 6)
    with torch.no_grad():
        cache = returned_cache(model(input_ids=ids[:, :4], use_cache=True))
        assert cache.get_seq_length() == 4
        later = model(input_ids=ids[:, 4:], **pass_cache(model, cache)).logits
        whole = model(input_ids=ids).logits[:, 4:]
    torch.testing.assert_close(later, whole, atol=1e-5, rtol=1e-4)


def test_without_a_cache_nothing_is_passed_and_nothing_returned():
    model = small.model("llama")
    assert pass_cache(model, None) == {}
    assert returned_cache(model(input_ids=small.ids(1), use_cache=False)) is None


def test_a_model_that_takes_no_cache_is_named():
    with pytest.raises(AssertionError, match=r"Linear\.forward takes no KV cache"):
        pass_cache(nn.Linear(1, 1), filled())


def scores(model, inputs, **arguments):
    """Tokens and logits of 6 greedy steps."""
    made = model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        **arguments,
    )
    return made.sequences, torch.stack(made.logits)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "qwen3", "mistral"])
def test_a_growing_cache_changes_nothing(family, rows):
    model = small.model(family).eval()
    ids = small.ids(rows, 7)
    mask = torch.ones_like(ids)
    mask[-1, :3] = 0  # left padding
    inputs = {"input_ids": ids, "attention_mask": mask}
    tokens, logits = scores(model, inputs)
    for room in (6, 2):  # for all tokens; so that storage has to grow
        own, found = scores(model, inputs, **growing_cache(model, room))
        assert torch.equal(own, tokens)
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


def perturbed(adapter, seed):
    torch.manual_seed(seed)
    perturb(adapter)
    return adapter


def test_a_growing_cache_serves_routers_and_a_bank():
    inputs = {"input_ids": small.ids(8, 5), "attention_mask": torch.ones(8, 5, dtype=torch.long)}
    for adapter in (small.adapted("milora"), small.adapted("lora")):
        model = adapter.model
        tokens, logits = scores(model, inputs)
        own, found = scores(model, inputs, **growing_cache(model, 6))
        assert torch.equal(own, tokens)
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    bank = Bank(small.model())
    for number in range(8):
        bank.add(str(number), perturbed(small.adapted("milora" if number % 2 else "lora"), number))
    with bank.batch(bank.names):
        tokens, logits = scores(bank.model, inputs)
    with bank.batch(bank.names):
        own, found = scores(bank.model, inputs, **growing_cache(bank.model, 6))
    assert torch.equal(own, tokens)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


def test_a_step_writes_in_place_and_nothing_that_was_given_out():
    layer, other = Growing(4), DynamicLayer()
    states = torch.randn(7, 2, 3, 1, 5)  # tokens of (B, H, 1, D)
    storage, kept = set(), []
    for state in states[:5]:
        keys, values = layer.update(state, 2 * state)
        other.update(state, 2 * state)
        storage.add(keys.data_ptr())
        kept.append((keys, keys.clone()))
        assert torch.equal(keys, other.keys) and torch.equal(values, other.values)
    assert len(storage) == 1
    for change in (
        lambda own: own.crop(-2),
        lambda own: own.reorder_cache(torch.tensor([1, 0])),
        lambda own: own.reset(),
    ):
        for own in (layer, other):
            change(own)
            own.update(states[5], states[6])
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
    assert all(torch.equal(keys, copy) for keys, copy in kept)


def test_layers_with_a_window_stay_as_they_are():
    model = MistralForCausalLM(MistralConfig(**small.GATED | {"sliding_window": 4}))
    (cache,) = growing_cache(model, 4).values()
    assert {type(layer) for layer in cache.layers} == {DynamicSlidingWindowLayer}
    inputs = {"input_ids": small.ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    assert torch.equal(scores(model.eval(), inputs)[1], scores(model, inputs, **growing_cache(model, 6))[1])
