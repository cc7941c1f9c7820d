"""LeLoRA: credit for what a choice did, and a policy that learns from it."""

import pytest
import small
import torch
from lelora_training import FAMILIES, lelora

from lowrank_cli.adapter.kinds.svd_window import decompose, output_gradients, reachable
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.methods.lelora.policy import Policy, advantages, features, share_out, without_trend


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_gradients_follow_from_those_of_outputs(family):
    _, adapter = lelora(family)
    seen = {}
    with output_gradients(adapter, lambda key, x, g: seen.setdefault(key, g.t() @ x)):
        adapter.model(input_ids=small.ids()).logits.square().mean().backward()
    plain = small.model(family)
    plain(input_ids=small.ids()).logits.square().mean().backward()
    for key, site in adapter.sites.items():
        expected = adapter.linears[site.path].rows(site.span, plain.get_submodule(site.path).weight.grad)
        torch.testing.assert_close(seen[key], expected, atol=1e-6, rtol=1e-4)


def test_credit_is_the_drop_of_the_dev_loss_to_first_order_matrix_by_matrix():
    method, adapter = lelora()
    strategies = method.strategies

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
    strategies = method.strategies

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
            kept = {}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.__setitem__(x.data_ptr(), x.numel()) or x, lambda x: x
            ):
                value = model(input_ids=small.ids()).logits.square().mean()
            sizes.append(sum(kept.values()))
            return value

        method.strategies.switch(1, 0.1, [loss, loss], None, last=False)
        saved[way], found[way] = sum(sizes), method.strategies.slopes
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
