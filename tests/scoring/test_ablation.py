"""The fast ablation engine against the plain loop: two passes for each rank."""

from itertools import chain

import pytest
import small
import torch
from ablations import dev_batch, naive

from lowrank_cli.adapter.ranks import resize
from lowrank_cli.errors import UserError
from lowrank_cli.scoring.ablation import ablate, ranks_of
from lowrank_cli.scoring.probe import Probe
from lowrank_cli.scoring.reuse import Reuse


@pytest.mark.parametrize(
    ("family", "tokens"),
    [
        *(("llama", tokens) for tokens in (1, 150, 10_000)),
        *((family, 150) for family in ("gpt2", "opt", "bert", "roberta", "gemma", "llama_classifier")),
    ],
)
def test_the_engine_equals_the_naive_loop(family, tokens):
    adapter = small.adapted("lora", family)
    with torch.no_grad():
        for head in (p for name, p in adapter.trained.items() if "lora_" not in name):
            head.mul_(20)  # or no rank would matter to a random classifier
    batch = dev_batch(family)
    resize(adapter, {key: ([0, 2], 0) for key in list(adapter.modules)[::3]})
    units = ranks_of(adapter)
    found = ablate(adapter, Probe(batch, tokens), units)
    whole, bare, without, alone = naive(adapter, batch, units)
    assert found.whole == pytest.approx(whole, abs=1e-5)
    assert found.bare == pytest.approx(bare, abs=1e-5)
    for unit in units:
        assert found.without[unit] == pytest.approx(without[unit], abs=1e-5), unit
        assert found.alone[unit] == pytest.approx(alone[unit], abs=1e-5), unit
    assert max(abs(whole - value) for value in without.values()) > 2e-3  # there was something to measure


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": ["V", "D"]}),  # linears that are not adapted are reused too
        ("gpt2", {"target_modules": ["c_attn", "U"]}),  # a packed linear by name has no role
        ("llama", {"target_modules": ["lm_head", "O"]}),
        ("qwen3", {}),
        ("llama", {"dropout": 0.5}),
        ("llama", {"kind": "dora"}),  # no sum over ranks
    ],
)
def test_whole_modules_and_odd_targets(family, settings):
    settings = dict(settings)
    adapter = small.adapted(settings.pop("kind", "lora"), family, **settings)
    for site, part in ((adapter.sites[key], part) for key, part in adapter.modules.items()):
        if hasattr(part, "magnitude"):  # a module without ranks is the bare linear
            part.magnitude.data = adapter.linears[site.path].rows(site.span).norm(dim=1)
    adapter.model.train()
    batch = dev_batch(family)
    units = [(key, rank) for key in adapter.modules for rank in (None, 1)]
    found = ablate(adapter, Probe(batch, 200), units)
    assert adapter.model.training
    adapter.model.eval()
    _, _, without, alone = naive(adapter, batch, units)
    for unit in units:
        assert found.without[unit] == pytest.approx(without[unit], abs=1e-5), unit
        assert found.alone[unit] == pytest.approx(alone[unit], abs=1e-5), unit


def test_the_model_is_as_before():
    adapter = small.adapted()
    before = adapter.model(input_ids=small.ids()).logits
    hooks = [len(module._forward_hooks) for module in adapter.model.modules()]
    ticks = []
    ablate(adapter, Probe(dev_batch("llama"), 100, tick=ticks.append), ranks_of(adapter))
    assert sum(ticks) == 2 * 5 * len(ranks_of(adapter))
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, before)
    assert hooks == [len(module._forward_hooks) for module in adapter.model.modules()]
    assert not any("forward" in vars(module) for module in adapter.model.modules())


def test_far_fewer_layers_run_than_in_the_naive_loop():
    """Counted, not timed: rows × layers computed, a pass over five rows of two layers being 10."""
    adapter = small.adapted()
    rows = []
    for layer in adapter.model.model.layers:
        layer.mlp.down_proj.base.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    batch = dev_batch("llama")
    units = ranks_of(adapter)
    ablate(adapter, Probe(batch, 10_000), units)
    naive_tokens = 2 * len(units) * 2 * batch["input_ids"].numel()
    assert sum(rows) < 0.6 * naive_tokens


def test_what_is_not_asked_for_is_not_computed():
    """Behind a layer whose inside is remembered; in an encoder's last feed-forward, all positions but the first."""
    adapter, batch = small.adapted(), dev_batch("llama")
    reuse, calls = Reuse(adapter, batch), []
    adapter.model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    assert reuse.known(0, 2, set(), 1) and reuse.layer == 0 and not calls
    adapter, positions = small.adapted("lora", "bert"), set()
    dense = adapter.model.bert.encoder.layer[-1].intermediate.dense
    dense.register_forward_hook(lambda module, args, output: positions.add(args[0].shape[1]))
    ablate(adapter, Probe(dev_batch("bert"), 100), ranks_of(adapter))
    assert positions == {1}


def test_groups_of_like_length_cover_the_batch():
    probe = Probe(dev_batch("llama"), 24)
    groups = probe.groups()
    assert sorted(length for group in groups for length in group["attention_mask"].sum(1).tolist()) == [5, 5, 9, 11, 12]
    assert all(group["input_ids"].numel() <= 24 for group in groups)
    assert all(group["attention_mask"].sum() >= 0.8 * group["attention_mask"].numel() for group in groups)
    assert [len(piece["labels"]) for (piece,) in probe.pieces(2)] == [3, 2]
    assert [len(piece["labels"]) for (piece,) in probe.pieces(8)] == [1] * 5


@pytest.mark.parametrize(("rows", "processes"), [(17, 2), (32, 3), (5, 4), (32, 1)])
def test_processes_share_the_pieces_of_the_whole_batch(rows, processes):
    """Each piece is summed over processes: one more in one of them would wait forever."""
    ids = torch.arange(rows).unsqueeze(1).repeat(1, 4)

    def pieces(process, processes):
        own = ids[process::processes]
        batch = {"input_ids": own, "attention_mask": torch.ones_like(own), "labels": own}
        probe = Probe(batch, 100, add_up=lambda own: torch.tensor(rows), share=(process, processes))
        return [sorted(row for part in piece for row in part["input_ids"][:, 0].tolist()) for piece in probe.pieces(8)]

    shares = [pieces(process, processes) for process in range(processes)]
    assert [sorted(chain(*parts)) for parts in zip(*shares, strict=True)] == pieces(0, 1)


def test_routed_modules_are_refused():
    with pytest.raises(UserError, match="prompt by prompt"):
        ablate(small.adapted("milora"), Probe(dev_batch("llama"), 100), [])
