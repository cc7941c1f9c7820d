"""Kinds of scores: what each measures, and how far the cheap ones agree with the ablation."""

import pytest
import small
import torch
from ablations import dev_batch, naive

from lowrank_cli.errors import UserError
from lowrank_cli.schema import SCORE_KINDS
from lowrank_cli.scoring.ablation import ranks_of
from lowrank_cli.scoring.cut import Cut, usual
from lowrank_cli.scoring.probe import Probe
from lowrank_cli.scoring.rank_scores import Scores, rows_to_run, score


def flat(scores):
    return torch.tensor([value for row in scores.values.values() for value in row])


def spearman(one, other):
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return torch.corrcoef(ranks)[0, 1].item()


def random_adapter(scale=0.05):
    adapter = small.adapted()
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_b.mul_(scale / 0.2 * torch.linspace(0, 2, 4))
    return adapter


def test_ab_is_the_papers_formula():
    adapter = small.adapted()
    batch = dev_batch("llama")
    whole, bare, without, alone = naive(adapter, batch, ranks_of(adapter))
    found = score("ab", adapter, Probe(batch, 300))
    expected = [whole - without[unit] + alone[unit] for unit in ranks_of(adapter)]
    assert flat(found).tolist() == pytest.approx(expected, abs=1e-5)
    assert (found.whole, found.bare) == (pytest.approx(whole, abs=1e-5), pytest.approx(bare, abs=1e-5))


def test_taylor_approximates_the_ablation():
    for scale, correlation, difference in ((0.05, 0.95, 0.5), (0.01, 0.99, 0.05)):
        adapter = random_adapter(scale)
        exact, cheap = (score(kind, adapter, Probe(dev_batch("llama"), 300)) for kind in ("ab", "taylor"))
        assert spearman(flat(exact), flat(cheap)) > correlation
        effect = flat(exact) - exact.bare
        assert (flat(cheap) - effect).norm() < difference * effect.norm()  # an error of second order


@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_a_rank_that_adds_nothing_scores_lowest(kind):
    """Its column of B is zero. Sensitivity and gates then have no gradient there; ablation finds no difference."""
    adapter = random_adapter(0.2)
    probe = Probe(dev_batch("llama"), 300)
    found = score(kind, adapter, probe, usual(adapter, "rank", 1.0))
    assert found.values.keys() == adapter.modules.keys()
    for row in found.values.values():
        nothing = found.bare if kind == "ab" else 0.0
        assert row[0] == pytest.approx(nothing, abs=1e-5)
    if kind in ("sensitivity", "magnitude"):
        assert all(row[0] < min(row[1:]) for row in found.values.values())


def test_relaxed_gates_follow_the_dev_loss():
    """A gate opens where opening lowers the loss: its sign is mostly that of the slope at 1."""
    adapter = random_adapter()
    gates, slopes = (score(kind, adapter, Probe(dev_batch("llama"), 300)) for kind in ("dnas", "taylor"))
    slope = torch.tensor([value for row in slopes.components["slope_at_1"].values() for value in row])
    used = slope.abs() > slope.abs().median()
    assert (flat(gates)[used].sign() == slope[used].sign()).double().mean() > 0.9


@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_scoring_changes_nothing_and_counts_its_rows(kind):
    adapter = small.adapted("lora", dropout=0.3)
    adapter.model.train()
    weights = {name: p.clone() for name, p in adapter.trained.items()}
    ticks = []
    probe = Probe(dev_batch("llama"), 300, tick=ticks.append)
    cut = usual(adapter, "rank", 0.2)
    first, second = score(kind, adapter, probe, cut), score(kind, adapter, probe, cut)
    assert sum(ticks) == 2 * rows_to_run(kind, adapter, probe, cut)
    assert first == second and adapter.model.training
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in adapter.trained.items())
    assert all(part.rank_gate is None and not part.skip for part in adapter.modules.values())


def test_mixed_is_exact_near_the_cut_and_taylor_beyond():
    adapter, probe = random_adapter(), Probe(dev_batch("llama"), 300)
    exact, cheap = score("ab", adapter, probe), score("taylor", adapter, probe)
    everything = score("mixed", adapter, probe, usual(adapter, "rank", 1.0))
    torch.testing.assert_close(flat(everything), flat(exact) - exact.bare, atol=1e-6, rtol=1e-5)
    assert everything.worth == everything.values and everything.whole == pytest.approx(exact.whole)
    found = score("mixed", adapter, probe, Cut(0.2, [(list(adapter.modules), 14)]))
    near = torch.tensor([value is not None for row in found.components["exact"].values() for value in row])
    assert near.nonzero().flatten().tolist() == sorted(flat(cheap).argsort(stable=True)[8:20].tolist())
    torch.testing.assert_close(flat(found)[near], (flat(exact) - exact.bare)[near], atol=1e-6, rtol=1e-5)
    assert flat(found)[~near].argsort(stable=True).tolist() == flat(cheap)[~near].argsort(stable=True).tolist()


@pytest.mark.parametrize("kind", ["taylor", "sensitivity"])
def test_a_signal_ends_a_backward_pass_before_it_is_over(kind, monkeypatch):
    """Only Python code between its operations lets a handler run; each tensor that is asked for has a hook for that."""
    adapter, hooked = random_adapter(), []
    grad = torch.autograd.grad

    def watched(output, inputs, *given):
        if isinstance(inputs, list):  # not the head's own backward pass
            hooked.extend(bool(tensor._backward_hooks) for tensor in inputs)
        return grad(output, inputs, *given)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    score(kind, adapter, Probe(dev_batch("llama"), 300))
    assert len(hooked) >= 14 and all(hooked)
    assert not any(parameter._backward_hooks for parameter in adapter.trained.values())


def test_two_processes_that_share_the_batch_find_the_same():
    """Each has some of the rows, and sums over both."""
    adapter = small.adapted()
    batch = dev_batch("llama")
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 5))]
    for kind in ("ab", "taylor"):
        sums, own = [], []
        for half in halves:
            seen = []
            probe = Probe(half, 300, add_up=lambda tensor, seen=seen: (seen.append(tensor.clone()), tensor)[1])
            own.append(score(kind, adapter, probe))
            sums.append(seen)
        totals = iter([a + b for a, b in zip(*sums, strict=True)])
        together = score(kind, adapter, Probe(halves[0], 300, add_up=lambda tensor, totals=totals: next(totals)))
        whole = score(kind, adapter, Probe(batch, 300))
        torch.testing.assert_close(flat(together), flat(whole), atol=1e-5, rtol=1e-4)


def test_what_a_rank_is_worth_is_counted_from_one_that_does_nothing():
    assert Scores("ab", {"a": [-8.0, -7.75, -9.0]}, bare=-8.0).worth == {"a": [0.0, 0.25, -1.0]}
    assert Scores("taylor", {"a": [0.5]}, bare=-8.0).worth == {"a": [0.5]}


def test_what_has_no_ranks_is_refused():
    for name in ("milora", "pissa"):
        with pytest.raises(UserError, match="serve every prompt"):
            score("ab", small.adapted(name), Probe(dev_batch("llama"), 100))
    with pytest.raises(UserError, match=r"score.kind: unknown value 'abl'.*'ab'"):
        score("abl", small.adapted(), Probe(dev_batch("llama"), 100))
