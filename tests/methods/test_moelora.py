"""MOELoRA: experts of one linear, chosen token by token."""

from functools import partial

import pytest
import small
import torch

from lowrank_cli.adapter.files import export, save_load
from lowrank_cli.adapter.kv_cache import pass_cache, returned_cache
from lowrank_cli.adapter.routing.router import load_balance
from lowrank_cli.errors import UserError
from lowrank_cli.methods.moelora.experts import Experts

#: Few experts of few ranks, to tell apart.
SETTINGS = {"rank": 8, "alpha": 16, "experts": 4, "k": 2}
adapted, method_with = partial(small.adapted, "moelora", **SETTINGS), partial(small.method, "moelora", **SETTINGS)


def part(experts=4, k=2, rank=8, alpha=6.0):
    torch.manual_seed(1)
    made = Experts(6, 5, rank, alpha, 0.0, experts=experts, k=k).eval()
    torch.nn.init.normal_(made.lora_b)
    torch.nn.init.normal_(made.router)
    return made


def update(module, x):
    """What a module adds to the frozen output of ``x`` (B, T, I)."""
    y = torch.zeros(x[..., 0].numel(), module.lora_b.shape[0])
    module.add_to(y, x)
    return y.view(*x.shape[:-1], -1)


def test_every_token_adds_its_own_experts_weighted_by_the_softmax_over_the_kept():
    module, x = part(), torch.randn(2, 3, 6)
    found = update(module, x)
    for row in range(2):
        for token in range(3):
            vector = x[row, token]
            logits = module.router @ vector
            kept = logits.argsort(descending=True)[:2]
            expected = torch.zeros(5)
            for gate, expert in zip(logits[kept].softmax(0), kept.tolist(), strict=True):
                ranks = slice(2 * expert, 2 * expert + 2)
                expected += gate * 2 * 6.0 / 8 * module.lora_b[:, ranks] @ (module.lora_a[ranks] @ vector)
            torch.testing.assert_close(found[row, token], expected)


def test_all_experts_with_equal_weights_are_lora():
    routed = adapted(k=4)
    plain = small.adapted("lora", rank=8, alpha=16)
    with torch.no_grad():
        for key, module in routed.modules.items():
            module.router.zero_()
            plain.modules[key].lora_a.copy_(module.lora_a)
            plain.modules[key].lora_b.copy_(module.lora_b)
    torch.testing.assert_close(
        routed.model(input_ids=small.ids()).logits, plain.model(input_ids=small.ids()).logits, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert"])
def test_a_batch_is_routed_like_its_rows_alone(family):
    """Also where a model flattens its tokens (OPT) and where a linear packs several roles (GPT-2)."""
    adapter = adapted(family)
    ids = small.ids(3)
    together = adapter.model(input_ids=ids).logits
    for row in range(3):
        alone = adapter.model(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_decoding_token_by_token_equals_the_full_forward(family):
    adapter = adapted(family)
    ids = small.ids(3, 8)
    with torch.no_grad():
        whole = adapter.model(input_ids=ids).logits
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            out = adapter.model(input_ids=token, use_cache=True, **pass_cache(adapter.model, cache))
            cache = returned_cache(out)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-4)


def test_tokens_of_one_prompt_use_different_experts():
    adapter = adapted()
    module = next(iter(adapter.modules.values()))
    gates = module.gates(torch.randn(1, 50, 32))
    chosen = {tuple(row) for row in (gates[0] > 0).tolist()}
    assert all(sum(row) == 2 for row in chosen)
    assert len(chosen) > 1


def test_the_task_loss_reaches_every_router():
    adapter = adapted()
    adapter.model(input_ids=small.ids(6)).logits.square().sum().backward()
    for key, module in adapter.modules.items():
        assert module.router.grad.abs().sum() > 0, key


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bf16_keeps_fp32_masters_and_computes_close_to_fp32_without_hard_choices(family):
    exact = adapted(family)
    adapter = method_with().adapt(small.model(family).to(torch.bfloat16))
    with torch.no_grad():
        for key, parameter in adapter.trained.items():
            parameter.copy_(exact.trained[key])
    assert {p.dtype for p in adapter.trained.values()} == {torch.float32}
    expected, found = save_load.canary(exact)[1], save_load.canary(adapter)[1]
    assert (found - expected).abs().max() / expected.abs().max() < 0.05
    adapter.model(input_ids=small.ids()).logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.trained.values())


def test_the_canary_leaves_the_hard_choice_as_it_was():
    adapter = adapted()
    before = adapter.model(input_ids=small.ids()).logits
    save_load.canary(adapter)
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, before)


def test_the_load_balance_loss_is_weighted_and_summed_over_routers():
    method = method_with(load_balance=0.5)
    adapter = method.adapt(small.model())
    adapter.model.train()(input_ids=small.ids(4))
    probabilities = [module.probabilities for module in adapter.modules.values()]
    assert len(probabilities) == 14
    assert all(p.shape == (4 * 9, 4) for p in probabilities)
    loss = method.extra_loss(adapter)
    assert loss.item() == pytest.approx(0.5 * load_balance(probabilities).item(), rel=1e-5)
    loss.backward()
    assert all(module.router.grad.abs().sum() > 0 for module in adapter.modules.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_padding_does_not_count_in_the_load_balance(family):
    method = method_with(load_balance=0.5)
    adapter = method.adapt(small.model(family).train())
    ids, width = small.ids(3), small.ids(3).shape[1]
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 2:] = 0, 0

    def loss(tokens):
        torch.manual_seed(0)  # of dropout
        adapter.model(input_ids=tokens, attention_mask=mask)
        return method.extra_loss(adapter).item()

    expected = loss(ids)
    assert all(len(part.probabilities) == width + 5 + 2 for part in adapter.modules.values())
    assert loss(torch.where(mask.bool(), ids, 3)) == pytest.approx(expected, rel=1e-5)
    adapter.model(input_ids=ids)
    assert method.extra_loss(adapter).item() != pytest.approx(expected, rel=1e-5)


def test_activated_parameters_are_those_of_k_experts_and_all_routers():
    method = method_with()
    adapter = method.adapt(small.model())
    metrics, _ = method.observations(adapter, lambda counts: counts)
    weights = sum(p.numel() for name, p in adapter.trained.items() if "lora_" in name)
    routers = sum(p.numel() for name, p in adapter.trained.items() if "router" in name)
    assert routers == sum(4 * site.in_features for site in adapter.sites.values())
    assert metrics == {"activated_parameters": weights / 2 + routers}
    assert adapter.count() == weights + routers


def test_merging_and_export_are_refused_in_one_line_and_change_nothing():
    adapter = adapted()
    before = adapter.model(input_ids=small.ids()).logits
    with pytest.raises(UserError, match="export: the experts are chosen token by token"):
        export.as_lora(adapter, None)
    with pytest.raises(UserError, match="merge: the experts are chosen token by token, so no single weight equals"):
        adapter.merge()
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, before)


def test_peft_would_compute_something_else():
    assert save_load.peft_config(adapted()) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 3}, "method.experts: 3 experts cannot share method.rank 8 evenly"),
        ({"k": 5}, r"method.k: 5 is out of range \(allowed: 1 to 4\)"),
        ({"experts": 0}, "method.experts: 0"),
        ({"load_balance": -1.0}, "method.load_balance: -1.0"),
    ],
)
def test_impossible_experts_are_errors(settings, message):
    with pytest.raises(UserError, match=message):
        method_with(**settings)
