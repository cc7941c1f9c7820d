"""SoRA: proximal gates, and the budget that they end at."""

import pytest
import small
import torch

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.kinds.rank_values import soft_threshold
from lowrank_cli.adapter.ranks import rebuild
from lowrank_cli.errors import UserError, WorkFailed

MODULES = 14


def fresh(**settings):
    method = small.method("sora", **settings)
    torch.manual_seed(3)
    return method, method.adapt(small.model())


def live(adapter):
    """How many gates are not 0."""
    return sum(int((part.values != 0).sum()) for part in adapter.modules.values())


def test_the_threshold_solves_the_proximal_problem():
    """argmin_v ½ (v − g)² + t |v|, found on a grid."""
    grid = torch.linspace(-3, 3, 6001)
    for gate in (-2.0, -0.3, 0.0, 0.4, 1.7):
        objective = 0.5 * (grid - gate) ** 2 + 0.5 * grid.abs()
        found = soft_threshold(torch.tensor(gate), 0.5)
        assert found.item() == pytest.approx(grid[objective.argmin()].item(), abs=1e-3)
    assert soft_threshold(torch.tensor([0.5, -0.5]), 0.5).tolist() == [0.0, 0.0]


def test_a_step_is_the_optimizers_and_then_the_threshold():
    method, adapter = fresh(sparsity=2.0)
    other, plain = fresh(sparsity=0.0)
    small.train(method, adapter, [1], 10, learning_rate=0.05)
    small.train(other, plain, [1], 10, learning_rate=0.05)
    for key, part in adapter.modules.items():
        torch.testing.assert_close(part.values, soft_threshold(plain.modules[key].values, 0.1), atol=1e-7, rtol=0)
    assert live(adapter) < live(plain) == 8 * MODULES


def test_the_gates_start_gaussian_and_the_function_does_not_change():
    _, adapter = fresh()
    values = torch.cat([part.values for part in adapter.modules.values()])
    assert abs(values.mean().item()) < 0.3
    assert 0.8 < values.std().item() < 1.2


def test_the_largest_gates_are_kept_and_the_others_leave():
    method, adapter = fresh(sparsity=0.1)
    small.train(method, adapter, range(1, 6), 10)
    assert method.unsettled()
    before = torch.cat([part.values.detach().abs() for part in adapter.modules.values()]).sort(descending=True).values
    small.train(method, adapter, [6], 10)
    assert not method.unsettled()
    assert live(adapter) == sum(adapter.ranks().values()) == 4 * MODULES
    after = torch.cat([part.values.abs() for part in adapter.modules.values()])
    assert after.min() > before[4 * MODULES] - 0.05, "the others were smaller, but for one step"
    chosen = adapter.ranks()
    small.train(method, adapter, range(7, 11), 10)
    assert adapter.ranks() == chosen


def test_a_penalty_that_leaves_less_than_the_budget_is_obeyed():
    method, adapter = fresh(sparsity=4.0)
    small.train(method, adapter, range(1, 7), 10)
    assert 0 < live(adapter) < 4 * MODULES
    metrics, _ = method.observations(adapter, lambda counts: counts)
    assert metrics["ranks"] == live(adapter)
    assert adapter.count() < metrics["initial_parameters"] / 2


def test_a_penalty_that_leaves_nothing_is_an_error():
    method, adapter = fresh(sparsity=1e3)
    with pytest.raises(WorkFailed, match=r"every gate is 0 after step 6: method.sparsity 1000.0 is too large"):
        small.train(method, adapter, range(1, 11), 10)


def test_a_rank_whose_gate_is_zero_contributes_exactly_nothing():
    method, adapter = fresh(sparsity=2.0)
    small.train(method, adapter, range(1, 5), 10)
    assert live(adapter) < 8 * MODULES
    before = adapter.model(input_ids=small.ids()).logits
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_a[part.values == 0] = 1e3
            part.lora_b[:, part.values == 0] = -1e3
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, before)


@pytest.mark.parametrize("at", [3, 7])
def test_it_continues_bit_for_bit_before_and_after_the_decision(at):
    whole, adapter = fresh()
    small.train(whole, adapter, range(1, 11), 10)
    half, other = fresh()
    small.train(half, other, range(1, at + 1), 10)
    resumed, third = fresh()
    rebuild(third, other.ranks(), "here")
    save_load.assign(third, save_load.tensors(other), "here")
    resumed.load_state(third, half.state())
    small.train(resumed, third, range(at + 1, 11), 10)
    assert all(torch.equal(parameter, third.trained[name]) for name, parameter in adapter.trained.items())


def test_impossible_settings_are_errors():
    with pytest.raises(UserError, match=r"method.sparsity: -1"):
        fresh(sparsity=-1.0)
    with pytest.raises(UserError, match=r"method.initial_rank: 2 is out of range \(allowed: at least 4\)"):
        fresh(initial_rank=2)
