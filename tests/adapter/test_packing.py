"""train.packing: examples in one row, without padding, give the losses and gradients of a padded batch."""

import re

import pytest
import small
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
)

from lowrank_cli.adapter.lm_head import answer_losses
from lowrank_cli.adapter.training.packing import TOLERANCES, pack, packed_inputs
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import AddsLoss
from lowrank_cli.tasks.encode import Encoded, collate_causal, collate_packed

LENGTHS = [(9, 4), (3, 1), (16, 9), (5, 4)]  #: tokens of an example, of these its prompt


def examples() -> list[Encoded]:
    tokens = iter(small.ids(1, sum(length for length, _ in LENGTHS))[0].tolist())
    return [Encoded([next(tokens) for _ in range(length)], prompt) for length, prompt in LENGTHS]


def passed(method, adapter, packed: bool):
    """Loss and gradients of a training pass over the examples."""
    adapter.model.train()
    batch = collate_causal(examples(), 0)
    if packed:
        batch = collate_packed(examples()) | packed_inputs([length for length, _ in LENGTHS])
    if not adapter.routing:
        del batch["prompt_mask"]
    labels = batch.pop("labels")
    loss = answer_losses(adapter.model, batch, labels).sum()
    if isinstance(method, AddsLoss):
        loss = loss + method.extra_loss(adapter)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in adapter.trained.items()}


def check(method, make, attention="sdpa", what="none"):
    """A packed pass equals a padded one up to rounding."""
    plain, adapter = make(), make()
    adapter.model.set_attn_implementation(attention)
    with adapter.disabled():
        pack(adapter.model)
    recompute(adapter.model, what)
    loss, gradients = passed(method, adapter, True)
    expected, padded = passed(method, plain, False)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        largest = float(padded[name].abs().max())
        torch.testing.assert_close(gradient, padded[name], rtol=1e-5, atol=2e-6 * largest, msg=name)


@pytest.mark.parametrize("name", small.TRAINABLE)
def test_every_method(name):
    check(small.method(name), lambda: small.adapted(name))


def test_an_empty_prompt_is_not_predicted_from_the_example_before(monkeypatch):
    monkeypatch.setattr(f"{__name__}.LENGTHS", [(9, 4), (6, 0), (5, 0)])
    check(small.method("lora"), small.adapted)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gpt2", "opt"])
def test_other_families(family):
    def make():
        adapter = small.adapted("milora", family)
        for module in adapter.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        return adapter

    check(small.method("milora"), make)


@pytest.mark.parametrize(("attention", "what"), [("eager", "none"), ("sdpa", "layers")])
def test_other_ways_to_compute_it(attention, what):
    check(small.method("lora"), lambda: small.adapted(), attention, what)


def test_sliding_windows():
    """Layers as in Gemma 3: windows shorter than the examples, and of all tokens."""
    settings = {key: value for key, value in small.GATED.items() if key != "num_hidden_layers"}
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**settings, num_hidden_layers=2, head_dim=8, sliding_window=4, layer_types=kinds)

    def make():
        torch.manual_seed(3)
        adapter = small.method("lora").adapt(Gemma3ForCausalLM(config).eval())
        for module in adapter.modules.values():
            nn.init.normal_(module.lora_b, std=0.2)
        return adapter

    check(small.method("lora"), make)


def test_only_the_blocks_of_examples_are_attended(monkeypatch):
    """The scores computed are those of the examples, not those between them."""
    model = small.model()
    pack(model)
    scores = []
    attention = nn.functional.scaled_dot_product_attention

    def counted(query, key, *args, **kwargs):
        scores.append(query.shape[-2] * key.shape[-2])
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    model(input_ids=small.ids(1, 12), **packed_inputs([3, 4, 5]), use_cache=False)
    assert scores == [9, 16, 25] * 2  # layers


def test_rounding_under_autocast_is_no_mixing(monkeypatch):
    monkeypatch.setitem(TOLERANCES, torch.float32, -1.0)
    with torch.autocast("cpu", torch.bfloat16):
        pack(small.model())
    with pytest.raises(UserError, match="mixes packed examples"):
        pack(small.model())


def test_passes_that_are_not_packed_stay_the_same():
    model, packing = small.model(), small.model()
    pack(packing)
    ids, mask = small.ids(), torch.ones(3, 9)
    mask[1, 5:] = 0
    with torch.no_grad():
        for inputs in ({"attention_mask": mask}, {}):
            assert torch.equal(model(ids, **inputs).logits, packing(ids, **inputs).logits)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: Lfm2ForCausalLM(
                Lfm2Config(**small.GATED, layer_types=["conv", "full_attention"], initializer_range=0.3)
            ),
            "train.packing: this 'lfm2' mixes packed examples",
        ),
        (small.sparse, "train.packing: this 'deepseek_v32' mixes packed examples"),  # its masks depend on "sdpa"
        (
            lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)),
            "train.packing: the attention of this 'bloom' does not keep packed examples apart",
        ),
    ],
)
def test_models_that_mix_examples_are_refused(model, message):
    torch.manual_seed(0)
    with pytest.raises(UserError, match=re.escape(message)):
        pack(model())
