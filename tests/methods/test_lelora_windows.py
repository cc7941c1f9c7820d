"""LeLoRA: windows that move without changing the function."""

import math

import pytest
import small
import torch
from lelora_training import FAMILIES, SETTINGS, lelora, logits, moved, train

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.kinds.svd_window import decompose, dithered, reachable, window_start


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
def test_the_decomposition_is_the_singular_value_decomposition(shape):
    weight, index = torch.randn(shape), torch.tensor([0, 1, 5, 6, 10, 11])
    exact = torch.linalg.svd(weight, full_matrices=False)
    found = decompose(weight, index)
    torch.testing.assert_close(found.values, exact.S)
    for start in (0, 5, 10):
        u, s, v = found.components(torch.arange(start, start + 2))
        own = slice(start, start + 2)
        torch.testing.assert_close((u * s) @ v, (exact.U[:, own] * exact.S[own]) @ exact.Vh[own], atol=1e-5, rtol=1e-4)


def test_a_matrix_without_full_rank_still_gives_directions_to_train():
    weight = torch.randn(12, 3) @ torch.randn(3, 20)
    u, s, v = decompose(weight, torch.arange(12)).components(torch.arange(12))
    torch.testing.assert_close((u * s) @ v, weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(12))
    assert (s[3:] < 1e-6 * s[0]).all()


@pytest.mark.parametrize(("components", "limit"), [(16, 12), (128, 32), (7, 7), (5, 1)])
def test_every_window_up_to_the_limit_is_reachable(components, limit):
    places = [i / 7 for i in range(8)]
    index = reachable(places, components, limit).tolist()
    for width in range(1, limit + 1):
        starts = [window_start(place, components, width) for place in places]
        assert starts[0] == 0 and starts[-1] == components - width, "principal and minor components"
        assert all(set(range(start, start + width)) <= set(index) for start in starts)


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_at_the_principal_end_is_pissa_exactly(family):
    method, adapter = lelora(family, policy="fixed")
    pissa = small.adapted("pissa", family, trained=False, alpha=8)
    for key, part in adapter.modules.items():
        assert torch.equal(part.lora_a, pissa.modules[key].lora_a)
        assert torch.equal(part.lora_b, pissa.modules[key].lora_b)
    for one, other in ((method, adapter), (small.method("pissa"), pissa)):
        torch.manual_seed(0)
        train(one, other, 4, 10)
    assert torch.equal(logits(adapter), logits(pissa))


def test_fixed_at_the_minor_end_trains_the_smallest_components():
    _, adapter = lelora(policy="fixed", start=1.0)
    for key, part in adapter.modules.items():
        site = adapter.sites[key]
        u, s, v = torch.linalg.svd(adapter.linears[site.path].weight, full_matrices=False)
        assert torch.equal(part.scale * part.lora_b @ part.lora_a, part.scale * part.start_b @ part.start_a)
        torch.testing.assert_close(
            part.scale * part.start_b @ part.start_a, (u[:, -4:] * s[-4:]) @ v[-4:], atol=1e-6, rtol=1e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_neither_the_function_nor_the_gradients(family):
    _, adapter = moved(family)
    adapter.model.eval()

    def gradients():
        adapter.model.zero_grad()
        out = adapter.model(input_ids=small.ids()).logits
        out.square().mean().backward()
        return out.detach(), [p.grad.clone() for part in adapter.modules.values() for p in part.tensors().values()]

    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_b.add_(torch.randn_like(part.lora_b) * 0.1)
    before = gradients()
    for key, part in adapter.modules.items():
        site = adapter.sites[key]
        part.fold(adapter.linears[site.path].rows(site.span))
        assert part.delta().abs().max() == 0
    torch.testing.assert_close(gradients(), before, atol=1e-5, rtol=1e-4)


def test_folding_for_ever_keeps_no_more_than_the_matrix():
    _, adapter = lelora()
    part = adapter.modules["model.layers.0.mlp.down_proj"]
    weight = adapter.linears["model.layers.0.mlp.down_proj"].weight
    expected = weight.clone()
    for _ in range(9):
        with torch.no_grad():
            part.lora_b.add_(0.1 * torch.randn_like(part.lora_b))
            expected += part.delta()
        part.fold(weight)
    assert len(part.folded_a) <= min(weight.shape)
    torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        weight - part.pretrained, part.delta_factors()[0] @ part.delta_factors()[1], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_disabling_and_unmerging_restore_every_bit(family):
    _, adapter = moved(family)
    pretrained = dict(small.model(family).named_parameters())
    trained, out = {path: linear.weight.clone() for path, linear in adapter.linears.items()}, logits(adapter)
    with adapter.disabled():
        for path, linear in adapter.linears.items():
            assert torch.equal(linear.weight, pretrained[f"{path}.weight"])
            assert not torch.equal(linear.weight, trained[path])
    adapter.merge()
    torch.testing.assert_close(logits(adapter), out, atol=1e-5, rtol=1e-4)
    adapter.unmerge()
    assert all(torch.equal(linear.weight, trained[path]) for path, linear in adapter.linears.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_after_moving_it_loads_exactly_and_an_earlier_one_too(family, tmp_path):
    method, adapter = moved(family)
    folders = []
    for first, name in ((5, "early"), (8, "late")):
        folders.append((tmp_path / name, logits(adapter)))
        folders[-1][0].mkdir()
        save_load.save(adapter, folders[-1][0], {})
        train(method, adapter, 3, 20, first=first)
    _, fresh = lelora(family)
    for target in (adapter, fresh):
        for folder, expected in reversed(folders):
            save_load.load(target, folder)
            assert torch.equal(logits(target), expected)


def test_a_bf16_weight_keeps_changes_below_its_precision_however_often_it_is_folded():
    """Five folds, each a thousandth of the weight: the nearest bf16 value would forget most of it."""
    adapter = small.method("lelora", **SETTINGS).adapt(small.model().to(torch.bfloat16))
    before = {path: linear.weight.float() for path, linear in adapter.linears.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for path, linear in adapter.linears.items():
            part = adapter.modules[path]
            noise = torch.randn(part.lora_b.shape, generator=generator)
            with torch.no_grad():
                size = 1e-3 * before[path].norm() / (part.scale * noise @ part.lora_a).norm()
                part.lora_b.add_(size * noise)
            part.fold(linear.weight)
    for path, linear in adapter.linears.items():
        b, a = adapter.modules[path].delta_factors()
        delta, seen = b @ a, linear.weight.float() - before[path]
        assert ((seen * delta).sum() / (delta * delta).sum()).item() == pytest.approx(1, abs=0.25)
        assert ((seen - delta).abs() <= 2**-7 * (before[path] + delta).abs() + 1e-12).all()
    with adapter.disabled():
        assert all(torch.equal(linear.weight.float(), before[path]) for path, linear in adapter.linears.items())


def test_windows_of_a_bf16_model_move_and_give_its_weights_back():
    torch.manual_seed(3)
    method = small.method("lelora", **SETTINGS)
    adapter = method.adapt(small.model().to(torch.bfloat16))
    before = {path: linear.weight.clone() for path, linear in adapter.linears.items()}
    rows, _ = train(method, adapter, 12, 12)
    assert len(rows) == 4 and all(math.isfinite(row["strategy/dev_loss"]) for row in rows)
    assert all(row["strategy/credit"] != 0 for row in rows[1:])
    assert not any(torch.equal(linear.weight, before[path]) for path, linear in adapter.linears.items())
    with adapter.disabled():
        assert all(torch.equal(linear.weight, before[path]) for path, linear in adapter.linears.items())


def test_loaded_while_switched_off_it_leaves_the_weights_alone(tmp_path):
    """So adapters whose factors alone are read cost no copy of the model."""
    _, adapter = moved()
    save_load.save(adapter, tmp_path, {})
    _, fresh = lelora()
    for linear in fresh.linears.values():
        linear.enable(False)
    save_load.fill(fresh, tmp_path)
    assert all(part.pretrained is None for part in fresh.modules.values())
    for linear in fresh.linears.values():
        linear.enable(True)
    assert torch.equal(logits(fresh), logits(adapter))


def test_dither_is_exact_for_bf16_values_and_right_in_the_mean():
    values = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    exact = values.to(torch.bfloat16)
    assert torch.equal(dithered(exact.float()), exact)
    for share in (1e-4, 1e-3):
        change = share * exact.float()
        seen = dithered(exact.float() + change).float() - exact.float()
        assert ((seen * change).sum() / (change * change).sum()).item() == pytest.approx(1, abs=0.05)
    assert torch.equal(dithered(values.t()), dithered(values.t().contiguous()))
