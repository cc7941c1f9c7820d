"""AdaLoRA: the paper's schedule, importance and masks, and the PEFT library's where the two say the same."""

from pathlib import Path

import pytest
import small
import torch

from lowrank_cli.adapter.files import export, save_load
from lowrank_cli.adapter.kinds.rank_values import (
    Importance,
    RankValues,
    cubic_budget,
    keep_largest,
    orthogonality,
    remove_ranks,
    zero_values,
)
from lowrank_cli.adapter.ranks import rebuild
from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run
from lowrank_cli.runs import Run

MODULES = 14


def fresh(**settings):
    """A method and its adapter on the small Llama: 8 ranks a module at the start, 4 on average in the end."""
    method = small.method("adalora", **{"interval": 1, "beta2": 0.7, "orthogonality": 0.1} | settings)
    torch.manual_seed(3)
    return method, method.adapt(small.model())


def randomised(**settings):
    method, adapter = fresh(**settings)
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_a.normal_(std=0.2)
            part.lora_b.normal_(std=0.2)
            part.values.normal_()
    return method, adapter


def live(adapter):
    """Ranks of each module whose value is not 0."""
    return {key: int((part.values != 0).sum()) for key, part in adapter.modules.items()}


def test_the_budget_falls_cubically_between_two_steps():
    budgets = [cubic_budget(step, 2, 10, 100, 20) for step in range(1, 13)]
    assert budgets[:2] == [100, 100]
    assert budgets[-3:] == [20, 20, 20]
    assert budgets[5] == 20 + 80 // 8, "half of the way: an eighth is left"
    assert budgets == sorted(budgets, reverse=True)


def test_keeping_takes_the_largest_of_all_modules_and_exactly_as_many():
    scores = {"a": torch.tensor([1.0, 5.0, 0.0]), "b": torch.tensor([3.0, 2.0, 0.0])}
    kept = keep_largest(scores, 3)
    assert {key: mask.tolist() for key, mask in kept.items()} == {"a": [False, True, False], "b": [True, True, False]}
    assert sum(int(mask.sum()) for mask in keep_largest(scores, 5).values()) == 5, "equal scores too"
    assert all(mask.all() for mask in keep_largest(scores, 6).values())


def test_importance_is_the_papers_formula():
    _, adapter = fresh()
    importance = Importance(adapter, 0.85, 0.7)
    key, part = next(iter(adapter.modules.items()))
    smooth, spread = torch.zeros(2, 8), torch.zeros(2, 8)  # one number of A, one of B, for each rank
    values = torch.zeros(2, 8)
    for _ in range(3):
        for parameter in adapter.trained.values():
            parameter.data = torch.randn_like(parameter)
            parameter.grad = torch.randn_like(parameter)
        importance.update({name: weight.grad for name, weight in importance.weights.items()})
        now = torch.stack([(part.lora_a * part.lora_a.grad).abs()[:, 5], (part.lora_b * part.lora_b.grad).abs()[5]])
        smooth = 0.85 * smooth + 0.15 * now
        spread = 0.7 * spread + 0.3 * (now - smooth).abs()
        now = (part.values * part.values.grad).abs()
        values[0] = 0.85 * values[0] + 0.15 * now
        values[1] = 0.7 * values[1] + 0.3 * (now - values[0]).abs()
    worth = {
        name: importance.sensitivity[f"{key}.{name}"] * importance.uncertainty[f"{key}.{name}"]
        for name in ("lora_A.weight", "lora_B.weight", "rank_values")
    }
    torch.testing.assert_close(worth["lora_A.weight"][:, 5], smooth[0] * spread[0])
    torch.testing.assert_close(worth["lora_B.weight"][5], smooth[1] * spread[1])
    torch.testing.assert_close(worth["rank_values"], values[0] * values[1])
    expected = worth["lora_A.weight"].mean(1) + worth["lora_B.weight"].mean(0) + worth["rank_values"]
    torch.testing.assert_close(importance.scores()[key], expected)


def test_orthonormal_rows_have_no_penalty_and_it_pulls_towards_them():
    assert orthogonality(torch.linalg.qr(torch.randn(7, 3))[0].T).item() == pytest.approx(0, abs=1e-10)
    assert orthogonality(2 * torch.eye(3)).item() == pytest.approx(27)
    method, adapter = fresh(orthogonality=1.0)
    before = method.extra_loss(adapter).item()
    small.train(method, adapter, range(1, 6), 100, learning_rate=0.02)
    assert method.extra_loss(adapter).item() < before


def test_the_budget_is_reached_and_the_rest_has_left():
    method, adapter = fresh()
    small.train(method, adapter, range(1, 6), 10)
    assert method.unsettled()
    assert sum(adapter.ranks().values()) == 8 * MODULES
    small.train(method, adapter, [6], 10)
    assert not method.unsettled()
    chosen = adapter.ranks()
    assert sum(chosen.values()) == 4 * MODULES
    assert len(set(chosen.values())) > 1, "not the same everywhere"
    small.train(method, adapter, range(7, 11), 10)
    assert adapter.ranks() == chosen
    assert {part.scale for part in adapter.modules.values()} == {16 / 8}, "the scale is that of the start"


def test_pruned_ranks_may_come_back_until_then():
    method, adapter = fresh(interval=3)
    small.train(method, adapter, range(1, 4), 20)
    budget = cubic_budget(3, 2, 12, 8 * MODULES, 4 * MODULES)
    assert sum(live(adapter).values()) == budget < 8 * MODULES
    small.train(method, adapter, [4], 20)
    assert sum(live(adapter).values()) == 8 * MODULES


def test_a_silenced_rank_contributes_exactly_nothing_and_can_be_removed():
    _, adapter = randomised()
    kept = {key: torch.rand(8) < 0.5 for key in adapter.modules}
    zero_values(adapter, kept)
    before = adapter.model(input_ids=small.ids()).logits
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_a[part.values == 0] = 1e3
            part.lora_b[:, part.values == 0] = -1e3
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, before)
    remove_ranks(adapter, kept, None)
    assert adapter.ranks() == {key: int(mask.sum()) for key, mask in kept.items() if mask.any()}
    torch.testing.assert_close(adapter.model(input_ids=small.ids()).logits, before, atol=1e-5, rtol=1e-4)


def test_training_goes_on_from_fewer_ranks_than_it_would_start_with():
    """``lrk train run=FOLDER``, where that run's adapter is at its budget, or was pruned since."""
    method, adapter = fresh()
    wanted = dict(zip(adapter.sites, [6, 2, 3, *[5] * 10], strict=False))  # and one module none
    rebuild(adapter, wanted, "here")
    small.train(method, adapter, range(1, 11), 10)
    assert sum(adapter.ranks().values()) == 4 * (MODULES - 1) < sum(wanted.values())


def test_starting_at_the_final_budget_prunes_nothing():
    method, adapter = fresh(initial_rank=4)
    small.train(method, adapter, range(1, 11), 10)
    assert adapter.ranks() == dict.fromkeys(adapter.sites, 4)


@pytest.mark.parametrize("at", [3, 7])
def test_it_continues_bit_for_bit_before_and_after_the_decision(at):
    whole, adapter = fresh()
    small.train(whole, adapter, range(1, 11), 10)
    half, other = fresh()
    small.train(half, other, range(1, at + 1), 10)
    saved = {name: tensor.clone() for name, tensor in half.state().items()}
    resumed, third = fresh()
    rebuild(third, other.ranks(), "here")
    save_load.assign(third, save_load.tensors(other), "here")
    resumed.load_state(third, saved)
    small.train(resumed, third, range(at + 1, 11), 10)
    assert all(torch.equal(parameter, third.trained[name]) for name, parameter in adapter.trained.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_merging_is_the_same_function(family):
    adapter = small.method("adalora").adapt(small.model(family))
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_b.normal_(std=0.2)
            part.values.normal_()
    before = adapter.model(input_ids=small.ids()).logits
    adapter.merge()
    torch.testing.assert_close(adapter.model(input_ids=small.ids()).logits, before, atol=1e-5, rtol=1e-4)


def test_what_is_left_is_counted_and_drawn():
    method, adapter = fresh()
    small.train(method, adapter, range(1, 11), 10)
    metrics, (figure,) = method.observations(adapter, lambda counts: counts)
    sizes = {key: site.in_features + site.out_features + 1 for key, site in adapter.sites.items()}
    assert metrics["initial_parameters"] == sum(8 * size for size in sizes.values()) == fresh()[1].count()
    assert adapter.count() == sum(rank * sizes[key] for key, rank in adapter.ranks().items())
    assert metrics["ranks"] == sum(map(sum, figure["values"])) == 4 * MODULES
    assert metrics["modules"] == len(adapter.modules)
    assert save_load.peft_config(adapter) is None


def test_what_is_left_is_exported_as_a_plain_lora_of_those_ranks():
    method, adapter = fresh()
    small.train(method, adapter, range(1, 11), 10)
    loras, error = export.as_lora(adapter, None)
    assert {key: len(a) for key, (_, a) in loras.items()} == adapter.ranks()
    assert error < 1e-6
    assert export.lora_error(adapter, loras) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_rank": 3}, r"method.initial_rank: 3 is out of range \(allowed: at least 4\)"),
        ({"initial_rank": 17}, r"method.initial_rank: 17 is above the matrix"),
        ({"final_share": 0.8, "initial_share": 0.3}, "method.initial_share: 0.3 and method.final_share 0.8 are"),
        ({"interval": 0}, "method.interval: 0"),
    ],
)
def test_impossible_budgets_are_errors(settings, message):
    with pytest.raises(UserError, match=message):
        fresh(**settings)


@pytest.mark.slow
def test_only_adapters_within_the_budget_are_kept():
    quick = ["task=tiny_sentiment", "task.limit=16", "hardware.threads=1", "train.batch_size=4", "train.eval_every=1"]
    single_run.start("train", ["method=adalora", "train.max_steps=5", "train.patience=1", *quick], None, "lrk train")
    run = Run.open(Path("outputs/latest").resolve())
    evaluations = {row["step"]: "not_kept" in row for row in run.history() if "dev/loss" in row}
    assert [evaluations[step] for step in (1, 2, 3)] == [True, True, False]
    assert run.metrics["best_step"] >= 3
    assert run.metrics["ranks"] == 8 * 42
    assert run.metrics["trainable_parameters"] < run.metrics["initial_parameters"]


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def theirs(peft, adapter, weight):
    """The PEFT library's AdaLoRA on the same model with the same P, Λ and Q."""
    config = peft.AdaLoraConfig(
        init_r=8,
        target_r=4,
        tinit=1,
        tfinal=4,
        total_step=10,
        beta1=0.85,
        beta2=0.7,
        lora_alpha=16,
        orth_reg_weight=weight,
        target_modules=list({site.path.rpartition(".")[2] for site in adapter.sites.values()}),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(small.model(), config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, part in adapter.modules.items():
            for name, tensor in (("A", part.lora_a), ("B", part.lora_b), ("E", part.values.unsqueeze(1))):
                parameters[f"base_model.model.{key}.lora_{name}.default"].copy_(tensor)
            parameters[f"base_model.model.{key}.ranknum.default"].fill_(8 - 1e-5)  # it adds 1e-5, then divides by it
    return model.eval(), parameters


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_peft_library_computes_the_same_function_and_orthogonality(peft):
    _, adapter = randomised()
    ids = small.ids()
    ours = adapter.model(input_ids=ids, labels=ids)
    model, _ = theirs(peft, adapter, 1.0)
    found = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.logits, ours.logits, atol=1e-5, rtol=1e-4)
    norms = [orthogonality(m).sqrt() for part in adapter.modules.values() for m in (part.lora_a, part.lora_b.t())]
    penalty = torch.stack(norms).mean()  # the library's is the mean of the norms, the paper's the sum of their squares
    torch.testing.assert_close(found.loss - ours.loss, penalty, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_peft_library_has_the_same_schedule_importance_and_masks(peft):
    method, adapter = randomised(initial_share=0.1, final_share=0.4, orthogonality=0.0)
    model, parameters = theirs(peft, adapter, 0.0)
    allocator = model.base_model.rankallocator
    importance = None
    for number in range(1, 7):
        ids = torch.randint(3, small.VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(number))
        logits = model(input_ids=ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        allocator.update_ipt(model)
        with torch.no_grad():
            for parameter in parameters.values():
                if parameter.requires_grad:
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
        budget, _ = allocator.budget_schedule(number)
        assert budget == cubic_budget(number, 1, 6, 8 * MODULES, 4 * MODULES)
        small.train(method, adapter, [number], 10)
        importance = method.importance or importance  # the last one has served
        for key in adapter.sites:
            for name, other in (("lora_A.weight", "A"), ("lora_B.weight", "B"), ("rank_values", "E")):
                their_name = f"base_model.model.{key}.lora_{other}.default"
                mine = importance.sensitivity[f"{key}.{name}"], importance.uncertainty[f"{key}.{name}"]
                found = allocator.exp_avg_ipt[their_name], allocator.exp_avg_unc[their_name]
                for one, two in zip(mine, found, strict=True):
                    torch.testing.assert_close(one.flatten(), two.flatten(), atol=1e-7, rtol=1e-3)
        if number > 1:
            allocator.mask_to_budget(model, budget)
        for key in adapter.sites:
            found = parameters[f"base_model.model.{key}.lora_E.default"].flatten()
            part = adapter.modules.get(key) or adapter.emptied[key]
            torch.testing.assert_close(part.values, found[found != 0] if not method.unsettled() else found)
    assert not method.unsettled()
    assert sum(adapter.ranks().values()) == 4 * MODULES


def test_values_may_have_gates_too():
    part = RankValues(6, 5, 3, 3.0, 0.0)
    with torch.no_grad():
        part.lora_b.normal_()
        part.values.copy_(torch.tensor([2.0, 0.5, 1.0]))
    part.rank_gate = torch.tensor([1.0, 0.0, 3.0])
    expected = part.lora_b @ torch.diag(torch.tensor([2.0, 0.0, 3.0])) @ part.lora_a
    torch.testing.assert_close(part.delta(), expected)
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(part.hidden(x, part.lora_a) @ part.lora_b.T, x @ expected.T)
