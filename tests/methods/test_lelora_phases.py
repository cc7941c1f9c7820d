"""LeLoRA: phases over a run, a budget that is met exactly, resuming."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import small
import torch
from lelora_training import FAMILIES, lelora, logits, train
from resuming import history, train_broken_at

from lowrank_cli.adapter.files import optimizer_state, save_load
from lowrank_cli.adapter.kinds.svd_window import decompose
from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.launch import single_run
from lowrank_cli.methods.lelora import figures
from lowrank_cli.methods.protocol import Step
from lowrank_cli.runs import Run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reward", ["per_matrix", "global"])
def test_every_choice_meets_the_budget_and_leaves_the_function(family, reward):
    method, adapter = lelora(family, reward=reward)
    seen = []
    switch = method.strategies.switch

    def watched(*arguments, **settings):
        before = logits(adapter)
        row = switch(*arguments, **settings)
        torch.testing.assert_close(logits(adapter), before, atol=1e-5, rtol=1e-4)
        seen.append(row)
        return row

    method.strategies.switch = watched
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
    found = {figure["file"]: figure for figure in figures(method.strategies)}
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
        assert [figure["file"] for figure in figures(method.strategies)] == files


def test_a_rank_whose_component_stays_goes_on_with_its_moments():
    method, adapter = lelora()
    _, optimizer = train(method, adapter, 3, 100)
    strategies, rank = method.strategies, 4
    parts = list(adapter.modules.values())
    starts = [8] * len(parts)
    strategies.fold()
    strategies.open(starts, [rank] * len(parts), optimizer)
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
    strategies.fold()
    starts[0], starts[2] = 10, 0
    strategies.open(starts, [rank] * len(parts), optimizer)
    assert torch.equal(part.lora_a[:2], before[0][2:]), "components 10 and 11 were open"
    assert torch.equal(optimizer.state[part.lora_a]["exp_avg"][:2], moment[2:])
    assert not optimizer.state[part.lora_a]["exp_avg"][2:].any(), "12 and 13 are new"
    u, s, v = strategies.spectra[0].components(torch.tensor([12, 13]))
    torch.testing.assert_close(part.scale * part.lora_b[:, 2:] @ part.lora_a[2:], (u * s) @ v)
    assert torch.equal(other.lora_a, before[1]) and other.lora_a in optimizer.state
    assert third.lora_a not in optimizer.state


def test_the_last_choice_is_what_the_policy_prefers():
    method, adapter = lelora()
    strategies = method.strategies
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
    assert again.strategies.preference() == method.strategies.preference()


def test_in_the_middle_of_a_phase_it_goes_on_bit_for_bit():
    """With a policy that has learnt: its weights and moments, the last phases, dev gradients, kept ranks."""
    method, adapter = lelora()
    _, optimizer = train(method, adapter, 7, 20)
    saved, tensors, moments = (
        {name: tensor.clone() for name, tensor in part.items()}
        for part in (method.state(), save_load.tensors(adapter), optimizer_state.moments(optimizer))
    )
    assert "phase.2.rewards" in saved and saved["policy.heads.weight"].any()
    again, bench_model = lelora()
    save_load.assign(bench_model, tensors, "checkpoint")
    other = torch.optim.AdamW(list(bench_model.trained.values()), lr=0.01, fused=True)
    optimizer_state.load_moments(other, moments, "moments")
    again.load_state(bench_model, saved)
    rows = [
        train(*pair, 6, 20, first=8, optimizer=own)[0]
        for pair, own in (((method, adapter), optimizer), ((again, bench_model), other))
    ]
    assert len(rows[0]) == 3 and rows[0] == rows[1]
    after = [save_load.tensors(one) for one in (adapter, bench_model)]
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
    assert torch.equal(*(one.strategies.policy.heads.weight for one in (method, again)))


def test_a_policy_that_may_not_learn_ends_at_the_first_place_with_equal_widths():
    method, adapter = lelora(policy_learning_rate=0.0)
    rows, _ = train(method, adapter, 12, 12)
    assert rows[2]["strategy/starts"] != rows[1]["strategy/starts"]
    assert set(rows[-1]["strategy/starts"]) == {0} and set(rows[-1]["strategy/widths"]) == {4}


def test_a_matrix_may_get_no_components_and_some_again(tmp_path):
    method, adapter = lelora()
    count = len(adapter.modules)
    chosen = [torch.where(torch.arange(count) % 3 == k, -30.0, 0.0) for k in range(3)]
    method.strategies.policy.sample = lambda x, generator: (torch.zeros(count, dtype=torch.long), chosen[0])
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
    log_places, means = method.strategies.policy(method.strategies.choice["x"])
    torch.testing.assert_close(log_places.exp(), torch.full_like(log_places, 0.25))
    assert not means.any()
    learned, other = lelora()
    train(learned, other, 12, 12)
    assert learned.strategies.policy(learned.strategies.choice["x"])[1].any()


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


def test_a_tied_embedding_is_refused():
    with pytest.raises(UserError, match="'lm_head' shares its weight with the input embedding"):
        small.adapted("lelora", "gpt2", target_modules=["lm_head"])


@pytest.mark.slow
def test_resumed_in_the_middle_of_a_phase_it_is_bit_equal_and_draws_its_figures(pictures):
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
