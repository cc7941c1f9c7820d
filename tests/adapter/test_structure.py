"""Roles of decoders that no table names: found from the modules, and good for every method."""

from __future__ import annotations

import re
from pathlib import Path

import image_encoders
import pytest
import small
import torch
import transformers
from command import one_line
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank_cli.adapter.files.export import as_lora, lora_error
from lowrank_cli.adapter.model_structure import discover
from lowrank_cli.adapter.spans import Span, index, take
from lowrank_cli.adapter.target_sites import FAMILIES, PLAIN_GATED, POSITION_WISE, find_sites, known_sites, structure_of
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.errors import UserError
from lowrank_cli.scoring.ablation import ablate
from lowrank_cli.scoring.probe import Probe

SIZES = {
    "vocab_size": small.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2}
_NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": small.VOCABULARY}
#: Name: model type, configuration, roles.
MODELS = {
    "phi": ("phi", SIZES, "QKVOUD"),
    "phi3": ("phi3", GROUPED, "QKVOGUD"),
    "falcon": ("falcon", _NARROW | {"multi_query": True, "parallel_attn": True}, "QKVOUD"),
    "falcon_heads": ("falcon", _NARROW | {"multi_query": False, "alibi": True, "parallel_attn": False}, "QKVOUD"),
    "falcon_groups": ("falcon", _NARROW | {"new_decoder_architecture": True, "num_kv_heads": 2}, "QKVOUD"),
    "gpt_neox": ("gpt_neox", SIZES, "QKVOUD"),
    "olmo": ("olmo", GROUPED, "QKVOGUD"),
    "olmo2": ("olmo2", GROUPED, "QKVOGUD"),
    "stablelm": ("stablelm", GROUPED, "QKVOGUD"),
    "starcoder2": ("starcoder2", GROUPED, "QKVOUD"),
    "cohere": ("cohere", GROUPED, "QKVOGUD"),
    "granite": ("granite", GROUPED, "QKVOGUD"),
    "starcoder": ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "QKVOUD"),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 64}, "QKVOUD"),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "QKVOUD"),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64}, "QKVOUD"),
    "mixtral": ("mixtral", GROUPED | EXPERTS | {"num_local_experts": 4}, "QKVO"),
    "olmoe": ("olmoe", GROUPED | EXPERTS | {"num_experts": 4}, "QKVO"),
    "gemma3": (
        "gemma3",  # with a vision tower of more layers
        {
            "text_config": GROUPED | {"head_dim": 8},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 5,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            },
        },
        "QKVOGUD",
    ),
    "qwen2_moe": (
        "qwen2_moe",
        GROUPED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
        "QKVOGUD",
    ),
}
PACKED = ("phi3", "falcon", "falcon_heads", "falcon_groups", "gpt_neox", "bloom", "mpt", "starcoder")
EVERY = pytest.mark.parametrize("name", MODELS)
#: Models whose layers are not known to compute positions apart outside attention.
MIXING = ("starcoder", "qwen2_moe", "gemma3")
ROUTED = ("mixtral", "olmoe", "qwen2_moe")


def made(name: str):
    """The random model, always the same one, in evaluation mode."""
    kind, values, _ = MODELS[name]
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(kind, **values)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=small.ids()).logits


def lora(name: str, method: str = "lora", **settings):
    """An adapted model whose updates are not zero."""
    torch.manual_seed(3)
    adapter = small.method(method, **settings).adapt(made(name))
    with torch.no_grad():
        for module in adapter.modules.values():
            module.lora_b.normal_(std=0.2)
    return adapter


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "opt"])
def test_what_is_found_is_what_the_table_says(kind):
    model = small.FAMILIES[kind]()
    found, tabled = discover(model), structure_of(model)
    assert (found.layers, found.roles) == (tabled.layers, tabled.roles)


@EVERY
def test_roles(name):
    model, roles = made(name), MODELS[name][2]
    assert model.config.model_type not in FAMILIES
    sites = known_sites(model)
    assert [(site.layer, site.role) for site in sites] == [(layer, role) for layer in range(2) for role in roles]
    assert find_sites(model, ["all"]) == sites
    assert bool(structure_of(model).left_out) == (name in ROUTED)


@EVERY
def test_adapter_starts_as_the_bare_model_and_merges_to_itself(name):
    torch.manual_seed(3)
    bare = logits(made(name))
    adapter = small.method("lora").adapt(made(name))
    assert torch.equal(logits(adapter.model), bare)
    adapter = lora(name)
    adapted = logits(adapter.model)
    assert not torch.allclose(adapted, bare, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(logits(adapter.model), bare)
    adapter.merge()
    assert torch.allclose(logits(adapter.model), adapted, atol=1e-4)
    adapter.unmerge()
    assert torch.equal(logits(adapter.model), adapted)


@pytest.mark.parametrize(
    "name", ["phi3", "falcon", "falcon_heads", "falcon_groups", "gpt_neox", "bloom", "mpt", "starcoder"]
)
@pytest.mark.parametrize("role", "QKV")
def test_spans_of_packed_linears_are_what_attention_reads(name, role):
    """Without queries, or without keys, all prompts attend alike; values have no part in that."""
    model = made(name)
    (site,) = [site for site in known_sites(model) if site.layer == 0 and site.role == role]
    linear = model.get_submodule(site.path)
    features = index(site.span, len(linear.weight))
    with torch.no_grad():
        linear.weight *= 50  # attention that depends on the prompt
        linear.weight[features] = 0
        if linear.bias is not None:
            linear.bias[features] = 0
    attention = model.get_submodule(site.path.rpartition(".")[0])
    weights = []
    attention.register_forward_hook(
        lambda module, args, output: weights.extend(
            part for part in output if torch.is_tensor(part) and part.dim() == 4
        )
    )
    with torch.no_grad():
        model(input_ids=small.ids(), output_attentions=True)
    last = weights[0][:, :, -1]  # (B, H, T)
    assert torch.allclose(last, last[:1].expand_as(last), atol=1e-5) == (role != "V")


@pytest.mark.parametrize("name", ["gpt_neox", "falcon_groups", "phi3"])
@pytest.mark.parametrize("method", ["pissa", "dora", "lelora"])
def test_methods_that_write_into_the_weights_write_into_their_span(name, method):
    bare = logits(made(name))
    adapter = small.method(method).adapt(made(name))
    assert torch.allclose(logits(adapter.model), bare, atol=1e-4)
    with adapter.disabled():
        assert torch.allclose(logits(adapter.model), bare, atol=1e-6)
    with torch.no_grad():
        for module in adapter.modules.values():
            module.lora_b.add_(torch.randn_like(module.lora_b), alpha=0.1)
    adapted = logits(adapter.model)
    assert not torch.allclose(adapted, bare, atol=1e-2)
    adapter.merge()
    assert torch.allclose(logits(adapter.model), adapted, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt_neox", "falcon_groups", "phi3", "mixtral"])
def test_exported_lora_is_the_same_function(name):
    adapter = lora(name)
    assert lora_error(adapter, as_lora(adapter, None)[0]) < 1e-4


def test_spans():
    y = torch.arange(12.0)
    assert take(y, Span(2, 4)).tolist() == [2, 3]
    assert take(y, Span(2, 4, 6)).tolist() == [2, 3, 8, 9]


@EVERY
def test_training_and_miloras_router(name):
    roles = MODELS[name][2]
    adapter = lora(name, "milora", k=2, bilevel=False)
    assert len(adapter.modules) == 2 * len(roles)
    method = small.method("milora", k=2, bilevel=False)
    before = {key: value.detach().clone() for key, value in adapter.trained.items()}
    adapter.model.train()
    small.train(method, adapter, range(1), 1)
    moved = {key for key, value in adapter.trained.items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".lora_")[0] for key in moved if ".lora_A" in key} & set(adapter.modules)
    assert any(".prompt_router." in key for key in moved)


@EVERY
def test_gradients_are_those_of_autograd(name):
    """The fused pass of training against the weights themselves."""
    adapter = lora(name)
    loss = adapter.model(input_ids=small.ids()).logits.square().mean()
    loss.backward()
    for site in (site for site in adapter.sites.values() if site.layer == 1):
        part, linear = adapter.modules[site.key], adapter.linears[site.path]
        assert part.lora_b.grad is not None and part.lora_b.grad.abs().max() > 0
    weights = {path: linear.weight.requires_grad_(True) for path, linear in adapter.linears.items()}
    adapter.merge()
    loss = adapter.model(input_ids=small.ids()).logits.square().mean()
    grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))
    for site in adapter.sites.values():
        part, linear = adapter.modules[site.key], adapter.linears[site.path]
        expected = part.scale * linear.rows(site.span, grads[site.path]) @ part.lora_a.t()  # (O, R)
        assert torch.allclose(part.lora_b.grad, expected, atol=1e-4, rtol=1e-3), site.key


@EVERY
def test_exact_scores_with_what_is_reused_equal_those_without(name):
    adapter = lora(name)
    rows = small.ids(4, 9)
    labels = rows.clone()
    labels[:, :6] = -100
    probe = Probe({"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": labels}, 512)
    units = [(key, None) for key in adapter.modules]
    fast = ablate(adapter, probe, units)
    structure = structure_of(adapter.model)
    assert structure.position_wise == (name not in MIXING)
    object.__setattr__(structure, "position_wise", False)
    plain = ablate(adapter, probe, units)
    for one, other in zip((fast.without, fast.alone), (plain.without, plain.alone)):
        assert one == pytest.approx(other, abs=1e-5)
    assert max(plain.without.values()) - min(plain.without.values()) > 1e-4


@pytest.mark.parametrize("name", sorted(PLAIN_GATED))
def test_gated_feed_forward_computed_again_is_the_same(name):
    adapters = lora(name), lora(name)
    recompute(adapters[1].model, "feed_forward")
    for adapter in adapters:
        adapter.model(input_ids=small.ids()).logits.square().mean().backward()
    one, other = ({key: value.grad for key, value in adapter.trained.items()} for adapter in adapters)
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


@pytest.fixture
def folder(tmp_path):
    """A function that writes the configuration of a model, without weights, and returns its folder."""

    def write(name: str) -> str:
        kind, values, _ = MODELS[name]
        transformers.AutoConfig.for_model(kind, **values).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def test_check_shows_layers_and_roles_without_weights(lrk, folder):
    out = lrk("check", "train", "method=lora", "model=hub", f"model.path={folder('phi')}").out
    assert re.search(r"layers +2 in model\.layers, each with Q K V O U D\n", out)
    out = lrk("check", "train", "method=milora", "model=hub", f"model.path={folder('mixtral')}").out
    assert "each with Q K V O (experts fused into 3-D parameters take no low-rank module)" in out
    out = lrk("check", "train", "method=lora", "model=gpt2").out
    assert "not known before the model is downloaded, with its config.json" in out
    assert "layers" not in lrk("check", "train", "method=lora").out


def test_check_refuses_roles_that_the_model_lacks(lrk, folder):
    chosen = ("method=lora", "model=hub", f"model.path={folder('phi')}")
    message = one_line(lrk("check", "train", *chosen, "method.target_modules=[G]"))
    assert message == "method.target_modules: family 'phi' has no role 'G' (it has Q K V O U D)"
    assert lrk("check", "train", *chosen, "method.target_modules=[U]").code == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("method=milora method.target_modules=[lm_head] method.k=1", "method.target_modules: 'lm_head' has no role"),
        ("method=milora method.target_modules=[q_proj,V] method.k=3", "method.k: 3 is out of range (allowed: 1 to 2)"),
        ("method=lora method.rank=129", "method.rank: 129 is above the matrix 'model.layers.0.self_attn.q_proj'"),
        ("method=sora method.initial_rank=99", "method.initial_rank: 99 is above the matrix 'model.layers.0.self_attn"),
        ("method=fanlora method.rank=300", "method.rank: the parameters of rank 300 on all roles make rank 1000"),
        ("method=lelora method.target_modules=[lm_head]", "method.target_modules: 'lm_head' shares its weight with"),
        ("method=lora method.rank_pattern=ranks.json", "method.rank_pattern: has 'layers.7.q', which this method does"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_found_before_its_weights_load(lrk, monkeypatch, settings, message):
    Path("ranks.json").write_text('{"layers.7.q": 2}')
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", None)
    for verb in ("check", "train"):
        assert one_line(lrk(verb, *settings.split(), "task.limit=8")).startswith(message)
    assert not Path("outputs").exists()


def test_lists_name_tested_models():
    tested = {kind for kind, _, _ in MODELS.values()} | {*image_encoders.KINDS}  # test_image_input.py
    assert tested >= POSITION_WISE | PLAIN_GATED


def test_roles_that_a_model_lacks_are_one_line():
    with pytest.raises(UserError, match=r"family 'phi' has no role 'G' \(it has Q K V O U D\)$"):
        find_sites(made("phi"), ["G"])
    with pytest.raises(UserError, match=r"no role 'U' \(it has Q K V O; experts fused into 3-D parameters"):
        find_sites(made("mixtral"), ["U"])


def test_model_without_layers_is_one_line():
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    assert structure_of(model) is None
    with pytest.raises(UserError, match=r"^method\.target_modules: 'all' names no module, as the layers and roles of"):
        find_sites(model, ["all"])
    assert isinstance(model.get_submodule(find_sites(model, ["in_proj"])[0].path), nn.Linear)
