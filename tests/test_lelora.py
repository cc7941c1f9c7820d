"""LeLoRA: windows that move without changing the function, a budget met exactly, and a policy that learns."""

from pathlib import Path

import pytest
import small
import torch
from torch.nn import functional as F

from lowrank_cli.adapter import spectrum, state
from lowrank_cli.adapter.policy import Baseline, Policy, share_out, shares
from lowrank_cli.adapter.spectrum import decompose, reachable, weight_gradients, window_start
from lowrank_cli.dispatch import single
from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.methods.protocol import Step
from lowrank_cli.runs import Run
from lowrank_cli.stages.train import Trainer

FAMILIES = ["llama", "gpt2", "bert"]


def train(method, adapter, steps, total, first=1, lr=0.01):
    """Optimizer steps on random inputs with the method acting between them; returns the logged rows."""
    model, rows = adapter.model, []

    def loss(seed):
        ids = torch.randint(3, small.VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(seed))
        logits = model(input_ids=ids).logits
        return F.cross_entropy(
            logits.flatten(0, -2), ids.flatten()[: logits.flatten(0, -2).shape[0]] % logits.shape[-1]
        )

    optimizer = torch.optim.AdamW(list(adapter.trained.values()), lr=lr)
    for number in range(first, first + steps):
        loss(number % 3).backward()
        optimizer.step()
        model.zero_grad()
        forget = lambda parameter: optimizer.state.pop(parameter, None)  # noqa: E731
        method.after_step(
            Step(number, total, adapter, lr, lambda at=number: loss(at), lambda t: t, forget=forget, log=rows.append)
        )
    return rows, optimizer


def lelora(family="llama", **settings):
    """A method and its adapter."""
    torch.manual_seed(3)
    method = small.method("lelora", **settings)
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


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_gram_decomposition_equals_the_exact_one(shape, monkeypatch):
    weight, index = torch.randn(shape), torch.tensor([0, 1, 5, 6, 10, 11])
    exact = decompose(weight, index)
    monkeypatch.setattr(spectrum, "EXACT", 4)
    fast = decompose(weight, index)
    torch.testing.assert_close(fast.values, exact.values)
    for start in (0, 5, 10):
        u, s, v = exact.window(start, 2)
        other = fast.window(start, 2)
        torch.testing.assert_close((other[0] * other[1]) @ other[2], (u * s) @ v, atol=1e-4, rtol=1e-4)


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
    pissa = small.adapted("pissa", family, trained=False)
    for key, part in adapter.modules.items():
        assert torch.equal(part.lora_a, pissa.modules[key].lora_a)
        assert torch.equal(part.lora_b, pissa.modules[key].lora_b)
    for one, other in ((method, adapter), (small.method("milora", bilevel=False), pissa)):
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
    torch.testing.assert_close(weight - part._pretrained, part.change()[0] @ part.change()[1], atol=1e-5, rtol=1e-4)


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
        state.save(adapter, folders[-1][0], {})
        train(method, adapter, 3, 20, first=first)
    _, fresh = lelora(family)
    for target in (adapter, fresh):
        for folder, expected in reversed(folders):
            state.load(target, folder)
            assert torch.equal(logits(target), expected)


def test_a_bf16_weight_is_rounded_once_however_often_it_is_folded():
    model = small.model().to(torch.bfloat16)
    method = small.method("lelora")
    adapter = method.adapt(model)
    before = {path: linear.weight.clone() for path, linear in adapter.linears.items()}
    for _ in range(5):
        for path, linear in adapter.linears.items():
            part = adapter.modules[path]
            with torch.no_grad():
                part.lora_b.add_(0.02 * torch.randn_like(part.lora_b))
            part.fold(linear.weight)
    for path, linear in adapter.linears.items():
        b, a = adapter.modules[path].change()
        assert torch.equal(linear.weight, (before[path].float() + b @ a).to(torch.bfloat16))


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


def test_credit_is_the_first_order_part_of_the_drop():
    method, adapter = lelora()
    train(method, adapter, 1, 100)
    strategies = method._strategies
    ids = small.ids()

    def loss():
        return adapter.model(input_ids=ids).logits.square().mean()

    start = loss().item()
    with torch.no_grad():
        for part in adapter.modules.values():
            for tensor in part.tensors().values():
                tensor.add_(1e-4 * torch.randn_like(tensor))
    end, credit = strategies._probe([loss, loss], lambda t: t)
    assert end == pytest.approx(loss().item(), rel=1e-6)
    assert credit.sum().item() == pytest.approx(start - end, rel=0.05, abs=1e-6)
    assert all(p.grad is None for p in adapter.trained.values()), "the next training step starts without gradients"


@pytest.mark.parametrize("credit", [[1.0, 3.0], [-1.0, 2.0], [1.0, -1.0], [0.0, 0.0]])
@pytest.mark.parametrize("drop", [0.5, -2.0])
def test_shares_sum_to_the_drop(credit, drop):
    found = shares(torch.tensor(credit), drop)
    assert found.sum().item() == pytest.approx(drop, abs=1e-6)
    if credit == [1.0, 3.0] and drop > 0:
        torch.testing.assert_close(found, torch.tensor([0.25, 0.75]) * drop)


@pytest.mark.parametrize("budget", [0, 1, 13, 24, 37, 40])
def test_widths_meet_the_budget_exactly_within_the_limits(budget):
    limits = [16, 8, 12, 4]
    for logits_ in (torch.zeros(4), torch.tensor([9.0, -9.0, 0.0, 1.0]), torch.tensor([-50.0, 50.0, 50.0, 0.0])):
        widths = share_out(logits_, budget, limits)
        assert sum(widths) == budget
        assert all(0 <= width <= limit for width, limit in zip(widths, limits, strict=True))
    assert share_out(torch.zeros(4), 16, limits) == [4, 4, 4, 4]
    assert share_out(torch.tensor([0.0, 0.0, 0.0, -20.0]), 24, limits) == [8, 8, 8, 0]


@pytest.mark.parametrize("per_matrix", [True, False])
def test_reinforce_finds_what_is_rewarded(per_matrix):
    """Matrices of one kind want the first place, of the other the last; wide ones of the second kind pay."""
    torch.manual_seed(0)
    kind = torch.arange(8) % 2
    x = torch.zeros(8, 50)
    x[:, 0] = kind * 2.0 - 1
    policy, baseline, generator = Policy(4), Baseline(8 if per_matrix else 1), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    for _ in range(120):
        places, logits_ = policy.sample(x, generator)
        reward = (places == kind * 3).float() + (2 * kind - 1) * logits_
        reward = reward if per_matrix else reward.mean(dim=0, keepdim=True)
        optimizer.zero_grad()
        policy.loss(x, places, logits_, baseline.advantage(reward).expand(8), 0.01).backward()
        optimizer.step()
    places, means = policy.greedy(x)
    assert places.tolist() == (kind * 3).tolist()
    assert means[kind == 1].min() > means[kind == 0].max()


def test_a_fresh_policy_is_indifferent():
    log_places, means = Policy(4)(torch.randn(6, 50))
    torch.testing.assert_close(log_places.exp(), torch.full((6, 4), 0.25))
    assert not means.any()


# ------------------------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reward", ["per_matrix", "global"])
def test_every_choice_meets_the_budget_and_leaves_the_function(family, reward):
    method, adapter = lelora(family, reward=reward)
    count, seen = adapter.count(), []
    switch = method._strategies.switch

    def watched(*arguments, **settings):
        before = logits(adapter)
        row = switch(*arguments, **settings)
        torch.testing.assert_close(logits(adapter), before, atol=1e-5, rtol=1e-4)
        seen.append(row)
        return row

    method._strategies.switch = watched
    rows, _ = train(method, adapter, 12, 12)
    assert [row["step"] for row in seen] == [1, 2, 4, 6, 7], "each phase, and the end of 60 % of training"
    assert all(sum(row["widths"]) == 4 * len(adapter.modules) for row in seen)
    assert {tuple(row["starts"]) for row in seen} != {tuple(seen[0]["starts"])}
    assert [part.rank for part in adapter.modules.values()] == seen[-1]["widths"]
    assert "strategy/rewards" not in rows[0] and len(rows[1]["strategy/rewards"]) == len(adapter.modules)
    total = rows[1]["strategy/dev_loss"] - rows[2]["strategy/dev_loss"]
    assert sum(rows[2]["strategy/rewards"]) == pytest.approx(
        (len(adapter.modules) if reward == "global" else 1) * total / 2
    )
    assert count > 0


def test_a_window_that_stays_keeps_its_moments_and_one_that_moves_loses_them():
    method, adapter = lelora()
    _, optimizer = train(method, adapter, 3, 100)
    strategies = method._strategies
    keys = list(adapter.modules)
    starts, widths = (strategies.log[name][-1].tolist() for name in ("starts", "widths"))
    moved_to = list(starts)
    moved_to[0] = 0 if starts[0] else 1
    part, other = adapter.modules[keys[0]], adapter.modules[keys[1]]
    kept = other.lora_b.clone()
    strategies._fold()
    strategies._open(moved_to, widths, lambda parameter: optimizer.state.pop(parameter, None))
    assert part.lora_a not in optimizer.state and other.lora_a in optimizer.state
    assert torch.equal(other.lora_b, kept)


def test_random_switches_as_much_and_learns_nothing():
    method, adapter = lelora(policy="random")
    rows, _ = train(method, adapter, 12, 12)
    assert len(rows) == 5
    log_places, means = method._strategies.policy(method._strategies.choice["x"])
    torch.testing.assert_close(log_places.exp(), torch.full_like(log_places, 0.25))
    assert not means.any()
    learned, other = lelora()
    train(learned, other, 12, 12)
    assert learned._strategies.policy(learned._strategies.choice["x"])[1].any()


def test_large_matrices_are_decomposed_again_only_when_they_changed(monkeypatch):
    from lowrank_cli.adapter import strategy

    monkeypatch.setattr(strategy, "SMALL", 1)
    calls = []
    monkeypatch.setattr(strategy, "decompose", lambda weight, index: calls.append(1) or decompose(weight, index))
    method, adapter = lelora(refresh=1e9)
    train(method, adapter, 6, 20)
    assert len(calls) == len(adapter.modules)
    method, adapter = lelora(refresh=0.0)
    train(method, adapter, 6, 20)
    assert len(calls) > 3 * len(adapter.modules)


def test_a_tied_embedding_is_refused():
    with pytest.raises(UserError, match="'lm_head' shares its weight with the input embedding"):
        small.adapted("lelora", "gpt2", target_modules=["lm_head"])


@pytest.mark.slow
def test_resumed_in_the_middle_of_a_phase_it_is_bit_equal_and_draws_its_figures(monkeypatch):
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
    single.start("train", overrides, None, "lrk train")
    whole = Run.open(Path("outputs/latest").resolve())
    take_step = Trainer._step

    def failing(trainer, step):
        if step == 6:
            raise WorkFailed("the power went out")
        return take_step(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", failing)
        with pytest.raises(WorkFailed, match="power"):
            single.start("train", overrides, None, "lrk train")
    broken = Run.open(Path("outputs/latest").resolve())
    single.resume("train", str(broken.path))
    found = [
        [{key: value for key, value in row.items() if key != "train/seconds"} for row in run.history()]
        for run in (whole, Run.open(broken.path))
    ]
    assert found[0] == found[1]
    assert [row["step"] for row in found[0] if "strategy/starts" in row] == [1, 3, 6, 8]
    first, second = (state.load_file(run.path / "adapter" / state.WEIGHTS) for run in (whole, broken))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert whole.metrics["strategy/choices"] == 4
    for name in ("windows", "rewards", "preferred_place", "preferred_width"):
        assert (whole.path / "plots" / f"{name}.png").stat().st_size > 1000
