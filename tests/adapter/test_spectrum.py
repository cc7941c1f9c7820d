"""Windows of the spectrum: components of the weight itself, trained."""

import pytest
import small
import torch

from lowrank_cli.adapter.adapted_model import inject
from lowrank_cli.adapter.kinds import svd_window
from lowrank_cli.adapter.kinds.svd_window import PrincipalWindow, principal
from lowrank_cli.adapter.target_sites import find_sites


def pissa(family="llama", **settings):
    """Trained a little: moved away from the start, not replaced."""
    adapter = small.adapted("pissa", family, trained=False, **settings)
    with torch.no_grad():
        for part in adapter.modules.values():
            for parameter in part.tensors().values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapter


def rows(adapter, key):
    site = adapter.sites[key]
    return adapter.linears[site.path].rows(site.span)


def test_principal_components_are_the_best_approximation():
    weight = torch.randn(20, 12)
    u, s, v = principal(weight, 5)
    torch.testing.assert_close(u.T @ u, torch.eye(5), atol=1e-5, rtol=0)
    rest = weight - (u * s) @ v
    torch.testing.assert_close(torch.linalg.matrix_norm(rest, 2), torch.linalg.svdvals(weight)[5])


def test_the_randomized_decomposition_finds_the_same_components(monkeypatch):
    weight = torch.randn(60, 8) @ torch.diag(torch.logspace(1, -1, 8)) @ torch.randn(8, 40) + 0.01 * torch.randn(60, 40)
    exact = principal(weight, 4)
    monkeypatch.setattr(svd_window, "EXACT", 10)
    found = principal(weight, 4)
    torch.testing.assert_close(found[1], exact[1])
    torch.testing.assert_close((found[0] * found[1]) @ found[2], (exact[0] * exact[1]) @ exact[2], atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", small.FAMILIES)
def test_a_fresh_window_is_exactly_the_bare_model_and_disabling_gives_it_back(family):
    bare = small.model(family)(input_ids=small.ids()).logits
    fresh = small.adapted("pissa", family, trained=False)
    assert torch.equal(fresh.model(input_ids=small.ids()).logits, bare)
    adapter = pissa(family)
    assert not torch.allclose(adapter.model(input_ids=small.ids()).logits, bare, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(adapter.model(input_ids=small.ids()).logits, bare)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_it_is_the_frozen_rest_plus_the_trained_components(family):
    adapter = pissa(family)
    logits = adapter.model(input_ids=small.ids()).logits
    plain = small.adapted("pissa", family, trained=False)
    with torch.no_grad():
        for key, part in plain.modules.items():
            trained, weight = adapter.modules[key], rows(plain, key)
            rest = weight - part.scale * part.start_b @ part.start_a
            weight.copy_(rest + trained.scale * trained.lora_b @ trained.lora_a)
    with plain.disabled():
        torch.testing.assert_close(plain.model(input_ids=small.ids()).logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_merge_and_unmerge(family):
    adapter = pissa(family)
    before = {path: linear.weight.clone() for path, linear in adapter.linears.items()}
    logits = adapter.model(input_ids=small.ids()).logits
    adapter.merge()
    torch.testing.assert_close(adapter.model(input_ids=small.ids()).logits, logits, atol=1e-5, rtol=1e-4)
    adapter.unmerge()
    assert all(torch.equal(linear.weight, before[path]) for path, linear in adapter.linears.items())


def test_a_bf16_model_starts_exactly_and_keeps_updates_far_below_its_own_precision():
    bare = small.model().to(torch.bfloat16)
    before = bare(input_ids=small.ids()).logits
    adapter = small.method("pissa").adapt(bare)
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, before)
    assert {p.dtype for p in adapter.trained.values()} == {torch.float32}
    part = adapter.modules["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        part.lora_b.add_(1e-4 * part.lora_b)  # bf16 has 8 bits: W + ΔW would round to W
    y, x = torch.zeros(3, 32, dtype=torch.bfloat16), torch.randn(1, 3, 32, dtype=torch.bfloat16)
    part.add_to(y, x)
    torch.testing.assert_close(y.float(), x[0].float() @ part.delta().T, atol=1e-6, rtol=0.05)
    assert part.delta().abs().max() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("alpha", [4, 8])
def test_start_and_training_equal_the_peft_library(family, alpha):
    peft = pytest.importorskip("peft")
    ours = small.adapted("pissa", family, trained=False, alpha=alpha)
    config = peft.LoraConfig(r=4, lora_alpha=alpha, init_lora_weights="pissa", target_modules=sorted(ours.linears))
    theirs = peft.get_peft_model(small.model(family), config)
    for path, linear in ours.linears.items():
        part, other = linear.low_rank["whole"], theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(
            part.scale * part.start_b @ part.start_a, other.get_delta_weight("default"), atol=1e-5, rtol=1e-4
        )
        rest = linear.weight - part.scale * part.start_b @ part.start_a
        torch.testing.assert_close(rest, other.base_layer.weight, atol=1e-5, rtol=1e-4)
    logits = []
    for model in (ours.model, theirs):
        low_rank = [p for name, p in model.named_parameters() if "lora_" in name]
        optimizer = torch.optim.AdamW(low_rank, lr=0.01, weight_decay=0.1)
        for _ in range(3):
            model.zero_grad()
            model(input_ids=small.ids()).logits.square().mean().backward()
            optimizer.step()
        logits.append(model(input_ids=small.ids()).logits)
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)


def test_the_scale_divides_the_start():
    model = small.model()
    halves = inject(model, find_sites(model, ["Q"]), rank=4, alpha=2, dropout=0.0, kind=PrincipalWindow)
    part = halves.modules["model.layers.0.self_attn.q_proj"]
    u, s, v = principal(model.get_submodule("model.layers.0.self_attn.q_proj").weight, 4)
    torch.testing.assert_close(0.5 * part.start_b @ part.start_a, (u * s) @ v)
