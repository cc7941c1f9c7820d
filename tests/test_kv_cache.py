"""The KV cache is found under any name, and nothing that continues one is taken for a new prompt."""

import pytest
import small
import torch
from torch import nn
from transformers import DynamicCache

from lowrank_cli.adapter.kv_cache import continued_cache, given_cache, pass_cache, returned_cache


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
    with pytest.raises(AssertionError, match="covers 6 tokens, the forward pass has 1"):
        continued_cache((), {"attention_mask": torch.ones(2, 6), "state": object()}, 1)


def test_a_routed_model_refuses_a_pass_that_hides_its_cache():
    adapter = small.adapted("milora")
    with torch.no_grad(), pytest.raises(AssertionError, match="no KV cache that is known here"):
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
