"""Ranks that change: what stays equal, what the optimizer keeps, what is saved and rebuilt."""

import json
from pathlib import Path

import pytest
import small
import torch
from torch import nn

from lowrank_cli import methods
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.ranks import rebuild, resize
from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run
from lowrank_cli.methods.lora import PatternConfig, read_pattern
from lowrank_cli.runs import Run

Q0, D1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def logits(adapter):
    with torch.no_grad():
        return adapter.model(input_ids=small.ids()).logits


def optimized(adapter):
    """An AdamW that has taken two steps on the adapter."""
    optimizer = torch.optim.AdamW(adapter.trained.values(), lr=1e-2)
    for _ in range(2):
        adapter.model(input_ids=small.ids()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_inserted_ranks_change_nothing(family):
    adapter = small.adapted("lora", family)
    before = logits(adapter)
    resize(adapter, {key: (list(range(4)), 2) for key in adapter.modules})
    assert set(adapter.ranks().values()) == {6}
    torch.testing.assert_close(logits(adapter), before, atol=1e-6, rtol=1e-6)
    for part in adapter.modules.values():
        assert part.lora_a[4:].std() > 0
        part.rank_gate = torch.tensor([0.0] * 4 + [1.0] * 2)
    assert torch.equal(logits(adapter), small.model(family)(input_ids=small.ids()).logits)


def test_fresh_ranks_have_the_variance_of_the_first_ones():
    adapter = small.adapted()
    torch.manual_seed(0)
    resize(adapter, {key: ([], 16) for key in adapter.modules})
    rows = torch.cat([part.lora_a for part in adapter.modules.values() if part.lora_a.shape[1] == 32])
    assert rows.std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.05)


def test_a_pruned_rank_is_a_closed_gate_and_the_scale_stays():
    adapter = small.adapted()
    scale = adapter.modules[Q0].scale
    adapter.modules[Q0].rank_gate = torch.tensor([1.0, 0.0, 1.0, 0.0])
    gated = logits(adapter)
    adapter.modules[Q0].rank_gate = None
    resize(adapter, {Q0: ([0, 2], 0)})
    torch.testing.assert_close(logits(adapter), gated)
    assert adapter.modules[Q0].scale == scale
    assert adapter.trained[f"{Q0}.lora_A.weight"].shape == (2, 32)


def test_ranks_that_stay_keep_their_optimizer_state():
    adapter, whole = small.adapted(), small.adapted()
    optimizer, other = optimized(adapter), optimized(whole)
    resize(adapter, {Q0: ([3, 1], 1)}, optimizer)
    for one, model in ((optimizer, adapter), (other, whole)):
        for parameter in model.trained.values():
            parameter.grad = torch.ones_like(parameter)
        one.step()
    mine, theirs = adapter.modules[Q0], whole.modules[Q0]
    assert torch.equal(mine.lora_a[:2], theirs.lora_a[[3, 1]])
    assert torch.equal(mine.lora_b[:, :2], theirs.lora_b[:, [3, 1]])
    moments = optimizer.state[mine.lora_a]
    assert torch.equal(moments["exp_avg"][2], torch.full((32,), 0.1))  # (1 - β1) · 1, from zero
    rate = (mine.lora_b[:, 2]).abs() / 1e-2
    assert 0 < rate.max() < 3  # no fresh rank runs ahead of the learning rate


def test_fresh_ranks_move_by_the_gradients_of_now_not_by_those_of_the_first_steps():
    """After a first gradient a thousand times as large, which Adam's second moment remembers."""
    adapter = small.adapted()
    part = adapter.modules[Q0]
    optimizer = torch.optim.AdamW([part.lora_a, part.lora_b], lr=1e-2)

    def updates(gradients):
        for gradient in gradients:
            part.lora_a.grad, part.lora_b.grad = (torch.full_like(p, gradient) for p in (part.lora_a, part.lora_b))
            before = part.lora_b.detach().clone()
            optimizer.step()
        return ((part.lora_b - before).abs() / 1e-2).mean(dim=0)

    updates([1000.0] + [1.0] * 200)
    resize(adapter, {Q0: ([0, 1, 2, 3], 2)}, optimizer)
    rates = updates([1.0] * 10)
    assert rates[:4].max() < 0.05
    assert 0.5 < rates[4:].min() <= rates[4:].max() < 3


def test_a_module_without_ranks_is_gone():
    adapter = small.adapted()
    optimizer = optimized(adapter)
    before = len(optimizer.param_groups[0]["params"])
    resize(adapter, {D1: ([], 0)}, optimizer)
    assert isinstance(adapter.model.get_submodule(D1), nn.Linear)
    assert not any(name.startswith(D1) for name in adapter.trained)
    assert len(optimizer.param_groups[0]["params"]) == before - 2 == len(optimizer.state)
    adapter.model(input_ids=small.ids()).logits.sum().backward()
    optimizer.step()


def test_a_packed_linear_keeps_its_other_roles():
    adapter = small.adapted("lora", "gpt2")
    path = "transformer.h.0.attn.c_attn"
    resize(adapter, {f"{path}.K": ([], 0)})
    linear = adapter.model.get_submodule(path)
    assert isinstance(linear, AdaptedLinear) and list(linear.low_rank) == ["Q", "V"]
    resize(adapter, {f"{path}.Q": ([], 0), f"{path}.V": ([], 0)})
    assert not isinstance(adapter.model.get_submodule(path), AdaptedLinear)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_an_adapter_of_other_ranks_is_saved_and_loaded(tmp_path, family):
    adapter = small.adapted("lora", family)
    first, second, *_, last = adapter.modules
    resize(adapter, {first: ([1], 0), second: ([0, 1, 2, 3], 3), last: ([], 0)})
    save_load.save(adapter, tmp_path, {})
    assert not any(f"{last}.lora" in name for name in save_load.load_file(tmp_path / save_load.WEIGHTS))
    fresh = small.adapted("lora", family, trained=False)
    save_load.load(fresh, tmp_path)
    assert fresh.ranks() == adapter.ranks()
    assert torch.equal(logits(fresh), logits(adapter))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_peft_library_loads_other_ranks_with_equal_logits(tmp_path, family):
    peft = pytest.importorskip("peft")
    adapter = small.adapted("lora", family)
    first, second, third, *_, last = adapter.modules
    resize(adapter, {first: ([1], 0), second: ([0, 1, 2, 3], 3), third: ([0, 2], 0), last: ([], 0)})
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_b.normal_(std=0.2)
    save_load.save(adapter, tmp_path, {})
    config = json.loads((tmp_path / save_load.CONFIG).read_text())
    assert config["r"] == 7 and config["lora_alpha"] / config["r"] == adapter.modules[first].scale
    assert last not in config["target_modules"]
    model = peft.PeftModel.from_pretrained(small.model(family), tmp_path).eval()
    with torch.no_grad():
        loaded = model(input_ids=small.ids()).logits
    torch.testing.assert_close(loaded, logits(adapter), atol=1e-5, rtol=1e-4)


def test_loading_brings_emptied_modules_back(tmp_path):
    """The best adapter may be older than the last pruning."""
    adapter = small.adapted()
    before, order = logits(adapter), list(adapter.trained)
    save_load.save(adapter, tmp_path, {})
    resize(adapter, {Q0: ([], 0), D1: ([1, 2], 0)})
    assert Q0 not in adapter.ranks()
    save_load.load(adapter, tmp_path)
    assert torch.equal(logits(adapter), before)
    assert list(adapter.trained) == order


def test_ranks_that_do_not_fit_are_refused():
    adapter = small.adapted()
    with pytest.raises(UserError, match="has 'elsewhere', which this method does not make"):
        rebuild(adapter, {"elsewhere": 2}, "file")
    with pytest.raises(UserError, match=r"rank 33 of .* does not fit 32 × 32"):
        rebuild(adapter, {Q0: 33}, "file")


# ------------------------------------------------------------------------------------------------ rank patterns


def test_lora_starts_from_the_ranks_that_another_run_found(tmp_path):
    """The file of a pruned or reallocated adapter: the same modules and ranks, LoRA's initial values, one scale."""
    found = small.adapted()
    resize(found, {Q0: ([1], 0), D1: ([], 0)})
    save_load.save(found, tmp_path, {})
    config = PatternConfig(
        name="lora",
        rank=4,
        alpha=8,
        dropout=0.0,
        target_modules=["all"],
        rank_pattern=f"{tmp_path}/{save_load.PATTERN}",
    )
    config.ranks = config.values_from_files({"rank_pattern"})["ranks"]
    config.validate()
    adapter = methods.create(config).adapt(small.model())
    assert adapter.ranks() == found.ranks() and D1 not in adapter.ranks() and adapter.ranks()[Q0] == 1
    assert {part.scale for part in adapter.modules.values()} == {2.0}
    assert torch.equal(logits(adapter), small.model()(input_ids=small.ids()).logits)
    again = tmp_path / "again"
    again.mkdir()
    save_load.save(adapter, again, {})
    assert not (again / save_load.PATTERN).exists()  # nothing has moved since
    save_load.load(methods.create(config).adapt(small.model()), again)
    Path(config.rank_pattern).unlink()
    assert config.values_from_files(set()) == {}  # the saved configuration holds the ranks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("[4]", "must hold ranks of 1 or more by module"),
        ('{"a": 0}', "must hold ranks of 1 or more by module"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_file_that_is_no_pattern_is_refused(tmp_path, text, message):
    file = tmp_path / "pattern.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"method.rank_pattern: .*{message}"):
        read_pattern(str(file))


def test_a_folder_names_the_pattern_inside_it(tmp_path):
    with pytest.raises(UserError, match=r"is a folder, not a JSON file, and no run whose ranks have moved"):
        read_pattern(str(tmp_path))
    file = tmp_path / "adapter" / save_load.PATTERN
    file.parent.mkdir()
    file.touch()
    for folder in (tmp_path, file.parent):
        with pytest.raises(UserError, match=rf"method.rank_pattern: '{folder}' is a folder, .* did you mean '{file}'"):
            read_pattern(str(folder))


def test_a_pattern_of_another_model_is_refused():
    with pytest.raises(UserError, match=r"method.rank_pattern: has 'layers.7.q', which this method does not make"):
        small.adapted("lora", ranks={"layers.7.q": 4})
    with pytest.raises(UserError, match=r"did you mean 'model.layers.1.self_attn.q_proj'"):
        small.adapted("lora", ranks={"model.layers.1.self_atn.q_proj": 4})


@pytest.mark.slow
def test_a_pruned_run_and_a_lora_of_its_pattern_have_the_same_size():
    quick = ["task=tiny_sentiment", "task.limit=16", "hardware.threads=1", "train.max_steps=2", "train.batch_size=8"]
    runs = []
    for verb, overrides in (
        ("train", ["method=lora", *quick]),
        ("prune", ["prune.budget=200", "score.kind=magnitude"]),
        ("train", ["method=lora", *quick, "method.rank_pattern=outputs/latest/adapter/rank_pattern.json"]),
        ("evaluate", []),
    ):
        single_run.start(verb, overrides, None, f"lrk {verb}")
        runs.append(Run.open(Path("outputs/latest").resolve()))
    assert runs[1].metrics["trainable_parameters"] == runs[2].metrics["trainable_parameters"]
    assert runs[2].metrics["trainable_parameters"] < runs[0].metrics["trainable_parameters"]
    assert runs[3].metrics["test/accuracy"] == runs[2].metrics["test/accuracy"]
    assert sum(runs[2].config()["method"]["ranks"].values()) == 200
