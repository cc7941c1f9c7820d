"""LeLoRA: windows that move without changing the function, a budget met exactly, and a policy that learns."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import small
import torch
from resuming import history, train_broken_at
from torch.nn import functional as F

from lowrank_cli.adapter.files import optimizer_state, save_load
from lowrank_cli.adapter.kinds.svd_window import decompose, dithered, reachable, weight_gradients, window_start
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.launch import single_run
from lowrank_cli.methods.lelora import figures
from lowrank_cli.methods.lelora.policy import Policy, advantages, features, share_out, without_trend
from lowrank_cli.methods.protocol import AfterStep, BeforeStep, Step
from lowrank_cli.runs import Run

FAMILIES = ["llama", "gpt2", "bert"]
#: Short phases and few places, so that a few steps see several choices.
SETTINGS = {"alpha": 8, "phase": 2, "explore": 0.6, "places": 4, "width_limit": 3, "refresh": 0.01}


def train(method, adapter, steps, total, first=1, lr=0.01, optimizer=None):
    """Optimizer steps on random inputs with the method acting between them; returns the logged rows."""
    model, rows = adapter.model, []

    def loss(seed):
        ids = torch.randint(3, small.VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(seed))
        logits = model(input_ids=ids).logits
        return F.cross_entropy(
            logits.flatten(0, -2), ids.flatten()[: logits.flatten(0, -2).shape[0]] % logits.shape[-1]
        )

    optimizer = optimizer or torch.optim.AdamW(list(adapter.trained.values()), lr=lr, fused=True)
    for number in range(first, first + steps):
        loss(number % 3).backward()
        step = Step(
            number,
            total,
            adapter,
            lr,
            lambda at=number: loss(at),
            lambda tensor: tensor,
            optimizer=optimizer,
            log=lambda row, at=number: rows.append({"step": at} | row),
        )
        if isinstance(method, BeforeStep):
            method.before_step(step)
        optimizer.step()
        model.zero_grad()
        if isinstance(method, AfterStep):
            method.after_step(step)
    return rows, optimizer


def lelora(family="llama", **settings):
    """A method and its adapter."""
    torch.manual_seed(3)
    method = small.method("lelora", **SETTINGS | settings)
    return method, method.adapt(small.model(family))


def moved(family="llama", **settings):
    """Trained through two choices of windows."""
    method, adapter = lelora(family, **settings)
    train(method, adapter, 4, 20)
    return method, adapter


def logits(adapter):
    adapter.model.eval()
    with torch.no_grad():
        return adapter.model(input_ids=small.ids()).logits


# ------------------------------------------------------------------------------------------ spectrum and windows


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
        weight - part._pretrained, part.delta_factors()[0] @ part.delta_factors()[1], atol=1e-5, rtol=1e-4
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
    assert all(part._pretrained is None for part in fresh.modules.values())
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


# ------------------------------------------------------------------------------------------- rewards and credit


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_gradients_are_those_of_autograd(family):
    _, adapter = lelora(family)
    seen = {}
    with weight_gradients(adapter, lambda key, gradient: seen.setdefault(key, gradient.clone())):
        adapter.model(input_ids=small.ids()).logits.square().mean().backward()
    plain = small.model(family)
    plain(input_ids=small.ids()).logits.square().mean().backward()
    for key, site in adapter.sites.items():
        expected = adapter.linears[site.path].rows(site.span, plain.get_submodule(site.path).weight.grad)
        torch.testing.assert_close(seen[key], expected, atol=1e-6, rtol=1e-4)
    assert all(not linear.weight.requires_grad and linear.weight.grad is None for linear in adapter.linears.values())


def test_credit_is_the_drop_of_the_dev_loss_to_first_order_matrix_by_matrix():
    method, adapter = lelora()
    strategies = method._strategies

    def loss():
        return adapter.model(input_ids=small.ids()).logits.square().mean()

    strategies.switch(1, 0.1, [loss], None, last=False)
    start = loss().item()
    for m, (key, part) in enumerate(adapter.modules.items()):
        if key.endswith(("q_proj", "k_proj")):
            continue  # attention is too flat at random weights for a drop of the first order
        to_a, to_b = strategies.slopes[f"{m}.a"], strategies.slopes[f"{m}.b"]
        length = 0.001 * start / (to_a.square().sum() + to_b.square().sum())
        with torch.no_grad():
            part.lora_a -= length * to_a
            part.lora_b -= length * to_b
        drop, credit = start - loss().item(), strategies.credit()
        assert drop > 1e-6
        assert credit[m].item() == pytest.approx(drop, rel=0.2, abs=0)
        assert not torch.cat((credit[:m], credit[m + 1 :])).any()
        with torch.no_grad():
            part.lora_a.copy_(part.start_a)
            part.lora_b.copy_(part.start_b)
        assert not strategies.credit().any(), "to and fro is worth nothing"


def test_credit_of_a_phase_adds_up_to_the_drop_of_the_dev_loss():
    method, adapter = lelora()
    strategies = method._strategies

    def loss():
        return adapter.model(input_ids=small.ids()).logits.square().mean()

    strategies.switch(1, 0.1, [loss], None, last=False)
    optimizer, start = torch.optim.SGD(adapter.trained.values(), lr=0.05), loss().item()
    for _ in range(10):
        adapter.model.zero_grad()
        loss().backward()
        optimizer.step()
    drop = start - loss().item()
    assert drop > 1e-5
    assert strategies.credit().sum().item() == pytest.approx(drop, rel=0.2, abs=0)


@pytest.mark.parametrize("what", ["feed_forward", "layers"])
def test_dev_gradients_save_as_little_as_training_where_it_computes_again(what):
    saved, found = {}, {}
    for way in ("none", what):
        method, adapter = lelora()
        recompute(adapter.model, way)
        sizes = []

        def loss(model=adapter.model, sizes=sizes):
            with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
                return model(input_ids=small.ids()).logits.square().mean()

        method._strategies.switch(1, 0.1, [loss, loss], None, last=False)
        saved[way], found[way] = sum(sizes), method._strategies.slopes
        assert any(slope.any() for slope in found[way].values())
    assert saved[what] < saved["none"]
    torch.testing.assert_close(found[what], found["none"])


def test_advantages_find_the_effect_of_a_choice_under_rewards_that_fall_a_thousandfold():
    """Rewards drop × size of the matrix × (1 + effect): only the effect is what a choice did."""
    generator = torch.Generator().manual_seed(0)
    effect = 0.3 * torch.randn(6, 42, generator=generator)
    sizes = torch.randn(42, generator=generator).exp()
    drop = torch.logspace(0, -3, 6).unsqueeze(1)
    rewards = drop * sizes * (1 + effect)
    found = advantages(rewards / rewards.abs().sum(dim=1, keepdim=True))
    assert torch.corrcoef(torch.stack((found.flatten(), effect.flatten())))[0, 1] > 0.8
    for phase in range(6):
        assert torch.corrcoef(torch.stack((found[phase], effect[phase])))[0, 1] > 0.5
    assert not advantages(rewards[:1]).any(), "one phase says nothing"


def test_without_its_trend_a_falling_reward_shows_what_a_choice_did():
    effect = torch.tensor([0.0, 0.3, -0.2, 0.1, -0.3, 0.1]).unsqueeze(1)
    found = advantages(without_trend(torch.linspace(3, 1, 6).unsqueeze(1) + effect))
    assert torch.corrcoef(torch.stack((found.flatten(), effect.flatten())))[0, 1] > 0.95
    torch.testing.assert_close(without_trend(torch.linspace(3, 1, 6).unsqueeze(1)), torch.zeros(6, 1))


@pytest.mark.parametrize("budget", [0, 1, 13, 24, 37, 40])
def test_widths_meet_the_budget_exactly_within_the_limits(budget):
    limits = [16, 8, 12, 4]
    for logits_ in (torch.zeros(4), torch.tensor([9.0, -9.0, 0.0, 1.0]), torch.tensor([-50.0, 50.0, 50.0, 0.0])):
        widths = share_out(logits_, budget, limits)
        assert sum(widths) == budget
        assert all(0 <= width <= limit for width, limit in zip(widths, limits, strict=True))
    assert share_out(torch.zeros(4), 16, limits) == [4, 4, 4, 4]
    assert share_out(torch.tensor([0.0, 0.0, 0.0, -20.0]), 24, limits) == [8, 8, 8, 0]
    assert share_out(torch.tensor([900.0, 1.0, 0.0, 0.0]), 20, [16, 8, 12, 4]) == [16, 2, 1, 1], "the rest by its share"


def learn(policy, x, reward_of, phases, generator):
    """A run of as many phases: eight passes over the last six after each."""
    optimizer, made = torch.optim.Adam(policy.parameters(), lr=0.01), []
    for _ in range(phases):
        places, logits_ = policy.sample(x, generator)
        likelihood = policy.log_likelihood(x, places, logits_)[0].detach()
        made = [*made, (x, places, logits_, likelihood, reward_of(places, logits_))][-6:]
        if len(made) > 1:
            *choices, rewards = (torch.stack(values) for values in zip(*made))
            for _ in range(8):
                optimizer.zero_grad()
                policy.loss(*choices, advantages(rewards), 0.01).backward()
                optimizer.step()


@pytest.mark.parametrize("per_matrix", [True, False])
def test_the_policy_finds_what_is_rewarded(per_matrix):
    """Matrices of one kind want the first place, of the other the last; wide ones of the second kind pay."""
    torch.manual_seed(0)
    kind = torch.arange(8) % 2
    x = torch.zeros(8, 50)
    x[:, 0] = kind * 2.0 - 1

    def reward(places, logits_):
        found = 3 + (places == kind * 3).float() + (2 * kind - 1) * logits_
        return found if per_matrix else found.mean().expand(8)

    policy = Policy(4)
    learn(policy, x, reward, 60 if per_matrix else 200, torch.Generator().manual_seed(0))
    places, means = policy.greedy(x)
    assert places.tolist() == (kind * 3).tolist()
    assert means[kind == 1].min() > means[kind == 0].max()


def test_a_dozen_phases_teach_the_policy_something():
    """As many as a short run has; places are worth 1 … 0.3, matrices credit of very different size, with noise."""
    worth = torch.linspace(1, 0.3, 8)
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        x, sizes, policy = torch.randn(42, 54), torch.randn(42).exp(), Policy(8)
        x[:, -1] = 0

        def reward(places, logits_, sizes=sizes):
            credit = sizes * (worth[places] + 0.3 * torch.randn(42))
            return credit / credit.abs().sum()

        learn(policy, x, reward, 12, torch.Generator().manual_seed(seed))
        found.append(worth[policy.greedy(x)[0]].mean().item())
    assert sum(found) / 3 > 0.75, "0.65 is chance"


def test_a_choice_counts_no_more_once_its_probability_has_moved_by_the_clip():
    policy, x = Policy(4), torch.randn(5, 50)
    places, logits_ = policy.sample(x, torch.Generator().manual_seed(0))
    likelihood = policy.log_likelihood(x, places, logits_)[0].detach()

    def gradient(likelihood, advantage):
        policy.zero_grad()
        policy.loss(x, places, logits_, likelihood, torch.full((5,), advantage), 0.0).backward()
        return policy.heads.weight.grad.norm().item()

    assert gradient(likelihood, 1.0) > 0
    assert gradient(likelihood - 0.3, 1.0) == 0, "already 1.35 times as likely"
    assert gradient(likelihood - 0.3, -1.0) > 0, "and too likely, if it was bad"


def test_the_entropy_bonus_keeps_places_open():
    torch.manual_seed(0)
    x, kept = torch.randn(6, 50), []
    for entropy in (0.0, 1.0):
        policy = Policy(4)
        torch.nn.init.normal_(policy.heads.weight, std=0.3)
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
        places, logits_ = policy.sample(x, torch.Generator().manual_seed(0))
        for _ in range(30):
            likelihood = policy.log_likelihood(x, places, logits_)[0].detach()
            optimizer.zero_grad()
            policy.loss(x, places, logits_, likelihood, torch.zeros(6), entropy).backward()
            optimizer.step()
        kept.append(policy.log_likelihood(x, places, logits_)[1].mean().item())
    assert kept[1] > kept[0] + 0.1


def test_only_differences_of_width_logits_count():
    policy = Policy(4)
    torch.nn.init.normal_(policy.heads.weight)
    means = policy(torch.randn(6, 50))[1]
    assert means.mean().abs() < 1e-6 and means.std() > 0.1


def test_features_tell_matrices_apart_and_not_their_scale():
    _, adapter = lelora()
    sites = list(adapter.sites.values())
    weights = [adapter.linears[site.path].rows(site.span).detach() for site in sites]
    count, energy = len(sites), torch.full((len(sites), 4), 0.25)

    def seen(scale):
        spectra = [decompose(scale * weight, reachable([0.0, 1.0], min(weight.shape), 4)) for weight in weights]
        return features(sites, spectra, torch.zeros(count), energy, 0.3)

    x = seen(1.0)
    assert x.shape == (count, 46 + 4) and x.isfinite().all()
    assert (x[:, -1] == 0.3).all()
    assert len({tuple(row.tolist()) for row in x}) == count
    torch.testing.assert_close(seen(7.0), x, atol=1e-3, rtol=1e-3)


def test_a_fresh_policy_is_indifferent():
    log_places, means = Policy(4)(torch.randn(6, 50))
    torch.testing.assert_close(log_places.exp(), torch.full((6, 4), 0.25))
    assert not means.any()


# ------------------------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reward", ["per_matrix", "global"])
def test_every_choice_meets_the_budget_and_leaves_the_function(family, reward):
    method, adapter = lelora(family, reward=reward)
    seen = []
    switch = method._strategies.switch

    def watched(*arguments, **settings):
        before = logits(adapter)
        row = switch(*arguments, **settings)
        torch.testing.assert_close(logits(adapter), before, atol=1e-5, rtol=1e-4)
        seen.append(row)
        return row

    method._strategies.switch = watched
    rows, _ = train(method, adapter, 12, 12)
    assert [row["step"] for row in seen] == [1, 2, 4, 6], "each whole phase within 60 % of training"
    assert all(sum(row["widths"]) == 4 * len(adapter.modules) for row in seen)
    assert {tuple(row["starts"]) for row in seen} != {tuple(seen[0]["starts"])}
    assert [part.rank for part in adapter.modules.values()] == seen[-1]["widths"]
    assert ["strategy/rewards" in row for row in rows] == [False, True, True, True]
    for before, row in pairwise(rows):
        if reward == "global":
            drop = math.log(before["strategy/dev_loss"] / row["strategy/dev_loss"]) / (row["step"] - before["step"])
            assert row["strategy/rewards"] == pytest.approx([drop] * len(adapter.modules), rel=1e-4)
        else:
            assert sum(abs(share) for share in row["strategy/rewards"]) == pytest.approx(1)


@pytest.mark.parametrize("reward", ["per_matrix", "global"])
def test_the_figure_shows_the_drop_of_the_dev_loss_whatever_the_reward_is(reward):
    method, adapter = lelora(reward=reward)
    rows, _ = train(method, adapter, 12, 12)
    found = {figure["file"]: figure for figure in figures(method._strategies)}
    assert list(found) == ["windows.png", "rewards.png", "preferred_place.png", "preferred_width.png"]
    losses = [row["strategy/dev_loss"] for row in rows]
    (drops,) = found["rewards.png"]["values"]
    assert found["rewards.png"]["columns"] == [2, 4, 6]
    steps = zip(drops, [1, 2, 2], strict=True)
    assert sum(drop * length for drop, length in steps) == pytest.approx(losses[0] - losses[-1], rel=1e-4, abs=1e-7)


def test_no_picture_of_what_a_run_had_no_time_for():
    for total, files in ((2, ["windows.png"]), (4, ["windows.png", "rewards.png"])):
        method, adapter = lelora()
        train(method, adapter, total, total)
        assert [figure["file"] for figure in figures(method._strategies)] == files


def test_a_rank_whose_component_stays_goes_on_with_its_moments():
    method, adapter = lelora()
    _, optimizer = train(method, adapter, 3, 100)
    strategies, rank = method._strategies, 4
    parts = list(adapter.modules.values())
    starts = [8] * len(parts)
    strategies._fold()
    strategies._open(starts, [rank] * len(parts), optimizer)
    train(method, adapter, 1, 100, first=5)
    part, other, third = parts[:3]
    for tensor in (part.lora_a, part.lora_b):
        optimizer.state[tensor] = {
            "step": torch.tensor(9.0),
            "exp_avg": torch.rand_like(tensor),
            "exp_avg_sq": torch.rand_like(tensor),
        }
        optimizer.state[other.lora_a] = optimizer.state[third.lora_a] = {"step": torch.tensor(9.0)}
    before = [part.lora_a.clone(), other.lora_a.clone()]
    moment = optimizer.state[part.lora_a]["exp_avg"].clone()
    strategies._fold()
    starts[0], starts[2] = 10, 0
    strategies._open(starts, [rank] * len(parts), optimizer)
    assert torch.equal(part.lora_a[:2], before[0][2:]), "components 10 and 11 were open"
    assert torch.equal(optimizer.state[part.lora_a]["exp_avg"][:2], moment[2:])
    assert not optimizer.state[part.lora_a]["exp_avg"][2:].any(), "12 and 13 are new"
    u, s, v = strategies.spectra[0].components(torch.tensor([12, 13]))
    torch.testing.assert_close(part.scale * part.lora_b[:, 2:] @ part.lora_a[2:], (u * s) @ v)
    assert torch.equal(other.lora_a, before[1]) and other.lora_a in optimizer.state
    assert third.lora_a not in optimizer.state


def test_the_last_choice_is_what_the_policy_prefers():
    method, adapter = lelora()
    strategies = method._strategies
    greedy = []
    kept = strategies.policy.greedy
    strategies.policy.greedy = lambda x: greedy.append(kept(x)) or greedy[-1]
    train(method, adapter, 12, 12)
    ((places, means),) = greedy
    assert torch.equal(strategies.choice["places"], places) and torch.equal(strategies.choice["logits"], means)
    assert strategies.preference()[1] == strategies.log["widths"][-1].tolist()


def test_behind_the_last_choice_nothing_as_large_as_the_weights_is_kept():
    method, adapter = lelora()
    train(method, adapter, 5, 12)
    assert {"spectrum.0.left", "slopes.0.a"} <= method.state().keys()
    train(method, adapter, 7, 12, first=6)
    kept = method.state()
    assert not any(name.startswith(("spectrum.", "slopes.")) for name in kept)
    again, _ = lelora()
    again.load_state(adapter, kept)
    assert again._strategies.preference() == method._strategies.preference()


def test_in_the_middle_of_a_phase_it_goes_on_bit_for_bit():
    """With a policy that has learnt: its weights and moments, the last phases, dev gradients, kept ranks."""
    method, adapter = lelora()
    _, optimizer = train(method, adapter, 7, 20)
    saved, tensors, moments = (
        {name: tensor.clone() for name, tensor in part.items()}
        for part in (method.state(), save_load.tensors(adapter), optimizer_state.moments(optimizer))
    )
    assert "phase.2.rewards" in saved and saved["policy.heads.weight"].any()
    again, twin = lelora()
    save_load.assign(twin, tensors, "checkpoint")
    other = torch.optim.AdamW(list(twin.trained.values()), lr=0.01, fused=True)
    optimizer_state.load_moments(other, moments, "moments")
    again.load_state(twin, saved)
    rows = [
        train(*pair, 6, 20, first=8, optimizer=own)[0]
        for pair, own in (((method, adapter), optimizer), ((again, twin), other))
    ]
    assert len(rows[0]) == 3 and rows[0] == rows[1]
    after = [save_load.tensors(one) for one in (adapter, twin)]
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
    assert torch.equal(*(one._strategies.policy.heads.weight for one in (method, again)))


def test_a_policy_that_may_not_learn_ends_at_the_first_place_with_equal_widths():
    method, adapter = lelora(policy_learning_rate=0.0)
    rows, _ = train(method, adapter, 12, 12)
    assert rows[2]["strategy/starts"] != rows[1]["strategy/starts"]
    assert set(rows[-1]["strategy/starts"]) == {0} and set(rows[-1]["strategy/widths"]) == {4}


def test_a_matrix_may_get_no_components_and_some_again(tmp_path):
    method, adapter = lelora()
    count = len(adapter.modules)
    chosen = [torch.where(torch.arange(count) % 3 == k, -30.0, 0.0) for k in range(3)]
    method._strategies.policy.sample = lambda x, generator: (torch.zeros(count, dtype=torch.long), chosen[0])
    train(method, adapter, 2, 20)
    assert [part.rank == 0 for part in adapter.modules.values()] == [m % 3 == 0 for m in range(count)]
    save_load.save(adapter, tmp_path, {})
    fresh = lelora()[1]
    save_load.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(adapter))
    chosen.pop(0)
    train(method, adapter, 2, 20, first=3)
    assert [part.rank == 0 for part in adapter.modules.values()] == [m % 3 == 1 for m in range(count)]


def test_random_switches_as_much_and_learns_nothing():
    method, adapter = lelora(policy="random")
    rows, _ = train(method, adapter, 12, 12)
    assert len(rows) == 4
    log_places, means = method._strategies.policy(method._strategies.choice["x"])
    torch.testing.assert_close(log_places.exp(), torch.full_like(log_places, 0.25))
    assert not means.any()
    learned, other = lelora()
    train(learned, other, 12, 12)
    assert learned._strategies.policy(learned._strategies.choice["x"])[1].any()


def test_large_matrices_are_decomposed_again_only_when_they_changed(monkeypatch):
    from lowrank_cli.methods.lelora import strategy

    monkeypatch.setattr(strategy, "SMALL", 1)
    calls = []
    monkeypatch.setattr(strategy, "decompose", lambda weight, index: calls.append(1) or decompose(weight, index))
    method, adapter = lelora(refresh=1e9)
    train(method, adapter, 6, 20)
    assert len(calls) == len(adapter.modules)
    method, adapter = lelora(refresh=0.0)
    train(method, adapter, 6, 20)
    assert len(calls) > 3 * len(adapter.modules)


def test_training_that_diverged_is_told_so():
    method, adapter = lelora()
    train(method, adapter, 3, 20)
    with torch.no_grad():
        next(iter(adapter.modules.values())).lora_b.fill_(torch.inf)
    with pytest.raises(WorkFailed, match=r"not finite at step 4; try a smaller train\.learning_rate"):
        train(method, adapter, 1, 20, first=4)


def test_a_run_too_short_for_the_policy_to_learn_says_so():
    said = []
    for phase in (5, 2):
        method, adapter = lelora(phase=phase)

        def loss(number, model=adapter.model):
            return model(input_ids=small.ids()).logits.square().mean()

        method.after_step(Step(1, 10, adapter, 0.01, loss, lambda tensor: tensor, say=said.append))
    assert len(said) == 1 and "no two phases of method.phase=5 steps in the first 60% (method.explore) of 10" in said[0]


def test_processes_cannot_share_it_while_windows_move(lrk):
    ended = lrk("check", "train", "method=lelora", "hardware.processes=2")
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "hardware.processes: 2, but training with method=lelora changes shapes" in ended.err
    assert lrk("check", "train", "method=lelora", "hardware.processes=2", "method.policy=fixed").code == 0


def test_a_tied_embedding_is_refused():
    with pytest.raises(UserError, match="'lm_head' shares its weight with the input embedding"):
        small.adapted("lelora", "gpt2", target_modules=["lm_head"])


@pytest.mark.slow
def test_resumed_in_the_middle_of_a_phase_it_is_bit_equal_and_draws_its_figures():
    overrides = [
        "method=lelora",
        "task=tiny_entailment",
        "task.limit=16",
        "hardware.threads=1",
        "train.max_steps=10",
        "train.batch_size=4",
        "train.log_every=1",
        "train.eval_every=5",
        "train.checkpoint_every=4",
        "method.phase=3",
        "method.explore=0.8",
    ]
    single_run.start("train", overrides, None, "lrk train")
    whole = Run.open(Path("outputs/latest").resolve())
    resumed = train_broken_at(6, overrides)
    assert history(resumed) == history(whole)
    assert [row["step"] for row in whole.history() if "strategy/starts" in row] == [1, 3, 6]
    first, second = (save_load.load_file(run.path / "adapter" / save_load.WEIGHTS) for run in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert whole.metrics["strategy/choices"] == 3
    for name in ("windows", "rewards", "preferred_place", "preferred_width"):
        assert (whole.path / "plots" / f"{name}.png").stat().st_size > 1000
