"""FanLoRA: scores of modules, the setting that they lead to, and training with it."""

import pytest
import small
import torch
from test_ablation import dev_batch, naive, plain
from torch.nn import functional as F

from lowrank_cli.errors import UserError
from lowrank_cli.schema import MODULE_KINDS, PruneConfig, ScoreConfig
from lowrank_cli.scoring.modules import rows_to_run, score
from lowrank_cli.scoring.probe import IGNORED, Probe
from lowrank_cli.scoring.setting import choose

FAMILIES = ("llama", "gpt2", "opt", "bert", "llama_classifier")


def trained(family="llama"):
    """An adapter whose modules differ, under a head that is not nearly constant."""
    adapter = small.adapted("lora", family)
    with torch.no_grad():
        for number, part in enumerate(adapter.modules.values()):
            part.lora_b.mul_(0.5 + number % 4)
        for head in (p for name, p in adapter.trained.items() if "lora_" not in name):
            head.mul_(20)
    return adapter


def scored(kind, adapter, batch, seed=0):
    found = score(kind, adapter, Probe(batch, 150), seed)
    assert found.level == "module" and all(len(values) == 1 for values in found.values.values())
    return {key: value for key, (value,) in found.values.items()}


@torch.no_grad()
def log_probabilities(adapter, batch):
    """log p of every response token (N, V), or of every example."""
    logits = adapter.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    labels = batch["labels"]
    return (logits if labels.dim() == 1 else logits[:, :-1][labels[:, 1:] != IGNORED]).log_softmax(dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_is_what_is_lost_without_a_module_plus_what_it_brings_alone(family):
    adapter, batch = trained(family), dev_batch(family)
    found = scored("ablation", adapter, batch)
    units = [(key, None) for key in adapter.modules]
    whole, bare, without, alone = naive(adapter, batch, units)
    for key, unit in zip(adapter.modules, units, strict=True):
        assert found[key] == pytest.approx(whole - without[unit] + alone[unit] - bare, abs=1e-5)
    assert max(map(abs, found.values())) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_is_the_divergence_of_the_answers_without_a_module(family):
    adapter, batch = trained(family), dev_batch(family)
    found = scored("kl", adapter, batch)
    whole = log_probabilities(adapter, batch)
    for key, part in adapter.modules.items():
        part.skip = True
        without = log_probabilities(adapter, batch)
        part.skip = False
        expected = (whole.exp() * (whole - without)).sum(dim=-1).mean().item()
        assert found[key] == pytest.approx(expected, abs=1e-5)
    assert min(found.values()) > 0 and max(found.values()) > 1e-3


def test_kl_looks_at_no_answer():
    adapter, batch = trained(), dev_batch("llama")
    other = dict(batch, labels=torch.where(batch["labels"] == IGNORED, IGNORED, 3))
    assert scored("kl", adapter, batch) == scored("kl", adapter, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_is_the_slope_of_a_gate_on_the_module(family):
    adapter, batch = trained(family), dev_batch(family)
    found = scored("taylor", adapter, batch)
    slopes = dict.fromkeys(adapter.modules, 0.0)
    for value in (1.0, 0.0):
        gates = {key: torch.tensor(value, requires_grad=True) for key in adapter.modules}
        for key, part in adapter.modules.items():
            part.rank_gate = gates[key] * torch.ones(part.rank)
        (-mean_loss(adapter, batch)).backward()
        for key, part in adapter.modules.items():
            slopes[key] += gates[key].grad.item()
            part.rank_gate = None
    assert list(found.values()) == pytest.approx(list(slopes.values()), abs=1e-5)


def mean_loss(adapter, batch):
    logits = adapter.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    labels = batch["labels"]
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_is_the_size_of_the_update_beside_the_frozen_output(family):
    adapter, batch = trained(family), dev_batch(family)
    found = scored("magnitude", adapter, batch)
    inputs, hooks = {}, []
    for path, linear in adapter.linears.items():
        hooks.append(linear.register_forward_hook(lambda m, args, out, path=path: inputs.update({path: args[0]})))
    plain(adapter, batch)
    for hook in hooks:
        hook.remove()
    used = batch["attention_mask"].bool()
    for key, part in adapter.modules.items():
        site = adapter.sites[key]
        x = inputs[site.path]
        x = x[used] if x.dim() == 3 else x[used.flatten()]
        weight = adapter.linears[site.path].rows(site.span)
        ratio = (x @ part.delta().t()).norm(dim=-1).sum() / (x @ weight.t()).norm(dim=-1).sum()
        assert found[key] == pytest.approx(ratio.item(), rel=1e-4)


def test_random_is_drawn_by_the_seed():
    adapter, batch = trained(), dev_batch("llama")
    assert scored("random", adapter, batch, 1) == scored("random", adapter, batch, 1)
    assert scored("random", adapter, batch, 1) != scored("random", adapter, batch, 2)


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_scoring_modules_changes_nothing_and_counts_its_rows(kind):
    adapter, batch, ticks = trained(), dev_batch("llama"), []
    before = adapter.model(input_ids=small.ids()).logits
    hooks = [len(module._forward_hooks) for module in adapter.model.modules()]
    probe = Probe(batch, 150, tick=ticks.append)
    assert score(kind, adapter, probe, 0) == score(kind, adapter, probe, 0)
    assert sum(ticks) == 2 * rows_to_run(kind, adapter, probe)
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, before)
    assert hooks == [len(module._forward_hooks) for module in adapter.model.modules()]
    assert all(parameter.grad is None for parameter in adapter.trained.values())


@pytest.mark.parametrize("kind", ["ablation", "kl", "taylor", "magnitude"])
def test_a_module_that_adds_nothing_scores_nothing(kind):
    adapter = trained()
    key, part = next(iter(adapter.modules.items()))
    with torch.no_grad():
        part.lora_b.zero_()
    found = scored(kind, adapter, dev_batch("llama"))
    assert found[key] == pytest.approx(0, abs=1e-6) and max(map(abs, found.values())) > 1e-3


def test_a_kind_of_the_other_level_is_refused():
    settings = ScoreConfig(level="module", kind="dnas", batch=1, tokens=1)
    with pytest.raises(UserError, match=r"score.kind: 'dnas' scores ranks \(allowed for modules: ablation, kl, .*"):
        settings.kind_of("module")
    assert ScoreConfig(level="module", kind=None, batch=1, tokens=1).kind_of("module") == "ablation"
    with pytest.raises(UserError, match="serve every prompt"):
        score("kl", small.adapted("milora"), Probe(dev_batch("llama"), 100), 0)


TABLE = ((9, 6, 7, 8), (1, 5, 4, 0), (3, 2, 1, 0))
SCORES = {(layer, role): float(value) for layer, row in enumerate(TABLE) for role, value in zip("QKVO", row)}


def kept(**settings):
    prune = PruneConfig(**({"drop": None, "budget": None, "per_layer": None} | settings))
    prune.validate()
    return {layer: "".join(roles) for layer, roles in choose(prune, SCORES).items()}


def test_which_modules_stay():
    assert kept(keep=2) == {"0": "QO", "1": "KV", "2": "QK"}
    assert kept(keep=2, per_layer=False) == {"0": "QKVO", "1": "KV", "2": ""}
    assert kept(keep=2, same_roles=True) == {"0": "QK", "1": "QK", "2": "QK"}
    assert kept(keep_total=5) == {"0": "QVO", "1": "K", "2": "Q"}
    assert kept(keep_total=5, per_layer=False) == {"0": "QKVO", "1": "K", "2": ""}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 4}, r"prune.keep: 4 is out of range \(allowed: 1 to 3; a layer has 4 modules\)"),
        ({"keep_total": 2}, r"prune.keep_total: 2 is out of range \(allowed: 3 to 11; 3 layers have 12 modules\)"),
        ({"keep": 1, "keep_total": 2}, "prune: give one of prune.drop=N"),
        ({"keep_total": 6, "same_roles": True}, "prune.same_roles: goes with prune.keep=N"),
        ({"keep": 1, "same_roles": True, "per_layer": False}, "prune.same_roles: goes with prune.keep=N"),
    ],
)
def test_amounts_of_modules_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        kept(**settings)
