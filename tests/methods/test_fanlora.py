"""FanLoRA: scores of modules, the setting that they lead to, and training with it."""

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
import yaml
from ablations import dev_batch, naive, plain
from rich.console import Console
from torch.nn import functional as F

from lowrank_cli import methods
from lowrank_cli.adapter.files import save_load
from lowrank_cli.config.composition import compose
from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.launch import single_run
from lowrank_cli.methods.fanlora import BUNDLED
from lowrank_cli.report.selections import learned
from lowrank_cli.runs import Run
from lowrank_cli.schema import MODULE_KINDS, PruneConfig, ScoreConfig
from lowrank_cli.scoring.cut import Cut, usual
from lowrank_cli.scoring.keep import module_cut
from lowrank_cli.scoring.module_scores import rows_to_run, score
from lowrank_cli.scoring.probe import IGNORED, Probe
from lowrank_cli.scoring.selection import Selection, choose, read, text
from lowrank_cli.stages.score import measure

FAMILIES = ("llama", "gpt2", "opt", "bert", "llama_classifier")


def trained(family="llama", targets=("all",)):
    """An adapter whose modules differ, under a head that is not nearly constant."""
    adapter = small.adapted("lora", family, target_modules=list(targets))
    with torch.no_grad():
        for number, part in enumerate(adapter.modules.values()):
            part.lora_b.mul_(0.5 + number % 4)
        for head in (p for name, p in adapter.trained.items() if "lora_" not in name):
            head.mul_(20)
    return adapter


def scored(kind, adapter, batch, seed=0):
    found = score(kind, adapter, Probe(batch, 150), seed, usual(adapter, "module", 0.1))
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


@pytest.mark.parametrize(
    ("family", "targets"), [*((family, ["all"]) for family in FAMILIES), ("bert", ["pooler.dense"])]
)
def test_magnitude_is_the_size_of_the_update_beside_the_frozen_output(family, targets):
    adapter, batch = trained(family, targets), dev_batch(family)
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
        x = inputs[site.path].flatten(0, -2)
        x = x if len(x) == len(used) else x[used.flatten()]  # a pooler sees one position of each example
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
    cut = usual(adapter, "module", 0.1)
    assert score(kind, adapter, probe, 0, cut) == score(kind, adapter, probe, 0, cut)
    assert sum(ticks) == 2 * rows_to_run(kind, adapter, probe, cut)
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


@pytest.mark.parametrize("kind", ["ablation", "kl", "taylor", "magnitude"])
def test_two_processes_that_share_the_batch_find_the_same(kind):
    """Each scores its rows, and what they sum is added up."""
    adapter, batch = trained(), dev_batch("llama")
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 5))]
    sums = [[], []]
    for half, seen in zip(halves, sums, strict=True):
        score(kind, adapter, Probe(half, 150, add_up=lambda t, seen=seen: (seen.append(t.clone()), t)[1]), 0)
    totals = iter([one + other for one, other in zip(*sums, strict=True)])
    together = score(kind, adapter, Probe(halves[0], 150, add_up=lambda tensor: next(totals)), 0)
    whole = scored(kind, adapter, batch)
    assert [value for (value,) in together.values.values()] == pytest.approx(list(whole.values()), abs=1e-5, rel=1e-4)


def test_a_score_that_is_no_number_ends_the_work():
    adapter = trained()
    key = list(adapter.modules)[3]
    adapter.modules[key].lora_b.data[0, 0] = float("nan")
    session = SimpleNamespace(
        adapter=adapter,
        probe=lambda size, tokens: Probe(dev_batch("llama"), tokens),
        config=SimpleNamespace(seed=0),
        accelerator=SimpleNamespace(is_main_process=False),
    )
    with pytest.raises(WorkFailed, match=rf"^score.kind=magnitude: the score of '{key}' is not a finite number"):
        measure(session, ScoreConfig(level="module", kind="magnitude", batch=5, tokens=150), "module", None)


def test_mixed_measures_the_two_modules_at_the_cut_of_each_layer():
    adapter, batch = trained(), dev_batch("llama")
    cut = module_cut(PruneConfig(drop=None, budget=None, per_layer=None, keep=3), adapter, 0.1)
    found = score("mixed", adapter, Probe(batch, 150), 0, cut)
    exact, cheap = scored("ablation", adapter, batch), scored("taylor", adapter, batch)
    for layer in range(2):
        order = sorted((key for key in cheap if adapter.sites[key].layer == layer), key=cheap.__getitem__)
        near = [key for key in order if found.components["exact"][key] != [None]]
        assert near == order[3:5]  # of seven the fourth is the last that goes
        assert [found.values[key][0] for key in near] == pytest.approx([exact[key] for key in near], abs=1e-6)
        assert max(found.values[key][0] for key in order[:3]) <= min(found.values[key][0] for key in near)
    whole = module_cut(PruneConfig(drop=None, budget=None, per_layer=None, keep_total=5), adapter, 0.5)
    assert whole == Cut(0.5, [(list(adapter.modules), 9)])
    every = score("mixed", adapter, Probe(batch, 150), 0, usual(adapter, "module", 1.0))
    assert [value for (value,) in every.values.values()] == pytest.approx(list(exact.values()), abs=1e-6)


def test_a_kind_of_the_other_level_is_refused():
    settings = ScoreConfig(level="module", kind="dnas", batch=1, tokens=1)
    with pytest.raises(UserError, match=r"'dnas' scores ranks \(allowed for modules: ablation, .*, auto; .*"):
        settings.kind_of("module")
    assert ScoreConfig(level="module", kind=None, batch=1, tokens=1).kind_of("module") == "ablation"
    with pytest.raises(UserError, match="serve every prompt"):
        score("kl", small.adapted("milora"), Probe(dev_batch("llama"), 100), 0)


TABLE = ((9, 6, 7, 8), (1, 5, 4, 0), (3, 2, 1, 0))
SCORES = {(layer, role): float(value) for layer, row in enumerate(TABLE) for role, value in zip("QKVO", row)}


def kept(scores=SCORES, **settings):
    prune = PruneConfig(**({"drop": None, "budget": None, "per_layer": None} | settings))
    prune.validate()
    return {layer: "".join(roles) for layer, roles in choose(prune, scores).items()}


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
        ({"keep": 1, "keep_total": 2}, "prune: prune.keep=1 and prune.keep_total=2 are given, and only one can be"),
        ({"keep": 7}, "prune.keep: 7 is out of range"),
        ({"keep_total": 6, "same_roles": True}, "prune.same_roles: goes with prune.keep=N"),
        ({"keep": 1, "same_roles": True, "per_layer": False}, "prune.same_roles: true keeps roles in each layer"),
    ],
)
def test_amounts_of_modules_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        kept(**settings)


def test_where_layers_have_unlike_many_modules_some_must_go():
    uneven = {place: score for place, score in SCORES.items() if place[0] == 0 or place[1] == "Q"}
    assert kept(uneven, keep=2) == {"0": "QO", "1": "Q", "2": "Q"}
    assert kept(uneven, keep=1, per_layer=False) == {"0": "QVO", "1": "", "2": ""}
    with pytest.raises(UserError, match=r"prune.keep: 2 is out of range \(allowed: 1 to 1; 3 layers have 6 modules\)"):
        kept(uneven, keep=2, per_layer=False)
    single_run = {place: score for place, score in SCORES.items() if place[1] == "Q"}
    with pytest.raises(UserError, match=r"prune.keep: 1 is out of range \(none can be taken out; a layer has 1 mod"):
        kept(single_run, keep=1)


def test_the_bundled_setting_is_what_its_scores_say():
    found = yaml.safe_load(BUNDLED.read_text())
    scores = {(layer, role): value for layer, row in found["scores"].items() for role, value in row.items()}
    assert kept(scores, keep=2) == {layer: "".join(roles) for layer, roles in read(BUNDLED).layers.items()}


def write(text, name="mine.yaml"):
    Path(name).write_text(text)
    return name


def fanlora(layers, family="llama", **settings):
    return small.method("fanlora", layers=layers, **settings).adapt(small.model(family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("layers", [{"all": ["Q", "U"]}, {"0": ["O"], "1": ["V", "D"]}, {"0": [], "1": ["Q", "U"]}])
def test_parameters_are_those_of_lora_within_half_a_rank(family, layers):
    adapter, every = fanlora(layers, family, rank=1, alpha=2), small.adapted("lora", family, rank=1)
    one = sum(adapter.sites[key].in_features + adapter.sites[key].out_features for key in adapter.modules)
    assert abs(adapter.count() - every.count()) <= one / 2
    assert {part.scale for part in adapter.modules.values()} == {2.0}
    kept = fanlora(layers, family, rank=1, match_parameters=False)
    assert kept.modules.keys() == adapter.modules.keys() and set(kept.ranks().values()) == {1}


def test_with_every_role_it_is_lora():
    adapter, other = fanlora({"all": list("QKVOGUD")}), small.adapted("lora", trained=False)
    assert adapter.ranks() == other.ranks()


@pytest.mark.parametrize(
    ("layers", "family", "message"),
    [
        (
            {"0": ["Q"], "1": ["V"], "2": ["V"]},
            "llama",
            "it is for 3 layers, and this model has 2 .0 to 1;",
        ),
        ({"0": ["Q"], "5": ["V"]}, "llama", "it lacks layer 1, and this model has 2"),
        ({"1": ["V"]}, "llama", "it lacks layer 0, and this model has 2"),
        ({"0": ["V"]}, "llama", "it is for 1 layer, and this model has 2"),
        ({"all": ["V", "G"]}, "gpt2", r"layer 0 of family 'gpt2' has no role 'G' \(it has Q K V O U D\)"),
        ({"all": ["q"]}, "llama", r"layer 0 of family 'llama' has no role 'q'; did you mean 'Q'\?"),
        ({"0": [], "1": []}, "llama", "it keeps no module"),
    ],
)
def test_a_setting_that_does_not_fit_the_model_is_refused(layers, family, message):
    with pytest.raises(UserError, match=f"^method.setting: {message}"):
        fanlora(layers, family)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_without_a_setting_another_model_is_told_how_to_get_one(family):
    method = methods.create(compose("train", ["method=fanlora"]).config.method)
    with pytest.raises(
        UserError, match=r"^method.setting: none is given, .* does not fit here \(.*: lrk train method=l"
    ):
        method.adapt(small.model(family))


def test_a_rank_that_no_module_could_have_is_refused():
    with pytest.raises(UserError, match=r"method.rank: the parameters of rank 4 on all roles make rank 39 on these"):
        fanlora({"0": ["K"], "1": ["K"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "has no 'layers'"),
        ("layers: {}", "has no 'layers'"),
        ("layers: {one: [Q]}", "'one' is no layer"),
        ("layers: {all: [Q], 0: [V]}", "'all' is no layer"),
        ("layers: {0: QV}", "layer 0 in 'mine.yaml' must be a list of roles"),
        ("layers: {0: [", "cannot be read"),
        ("layers: {0: [Q]}\nnmae: x", "unknown value 'nmae'; did you mean 'name'"),
    ],
)
def test_a_file_that_is_no_setting_is_refused(text, message):
    with pytest.raises(UserError, match=f"^method.setting: .*{message}"):
        read(write(text))


def test_what_is_written_is_read_again():
    selection = Selection("mine", {"0": ["Q", "V"], "1": []})
    found = text(selection, {(0, "Q"): 0.25, (0, "V"): -1e-9, (1, "Q"): 3.0}, {"family": "llama"}, "fanlora")
    assert read(write(found)) == selection
    assert "  0: [Q, V]\n  1: []\n" in found and "  0: {Q: 0.25, V: -1e-09}\n" in found


def test_the_configuration_holds_the_modules_of_the_file():
    file = write("layers: {0: [Q], 1: [D, V]}")
    config = compose("train", ["method=fanlora", f"method.setting={file}"]).config.method
    assert (config.layers, config.chosen_by) == ({"0": ["Q"], "1": ["D", "V"]}, "mine")
    assert config.setting == str(Path(file).absolute())
    renamed = compose("train", ["method=fanlora", f"method.setting={file}", "method.chosen_by=hand"]).config.method
    assert (renamed.layers, renamed.chosen_by) == (config.layers, "hand")
    later = compose("train", ["method=fanlora", "method.setting={prune}/setting.yaml"], later=("{prune}",))
    assert later.config.method.layers == {}
    bundled = compose("train", ["method=fanlora"]).config.method
    assert len(bundled.layers) == 6 and all(len(roles) == 2 for roles in bundled.layers.values())
    benched = compose("bench", [f"bench.methods=[base,'fanlora setting={file}']"]).config.variants
    assert benched[f"fanlora setting={file}"].layers == config.layers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_peft_library_loads_it_as_it_is(family, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = small.adapted("fanlora", family, layers={"0": ["Q", "U"], "1": ["D"]})
    save_load.save(adapter, tmp_path, {})
    model = peft.PeftModel.from_pretrained(small.model(family), tmp_path).eval()
    ids = small.ids()
    torch.testing.assert_close(model(input_ids=ids).logits, adapter.model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


QUICK = ["task.limit=16", "hardware.threads=1"]
TRAIN = ["train.max_steps=2", "train.batch_size=8", "train.eval_every=2", "train.checkpoint_every=0"]


def lrk_run(verb, *overrides):
    single_run.start(verb, list(overrides), None, f"lrk {verb}")
    return Run.open(Path("outputs/latest").resolve())


@pytest.mark.slow
def test_train_score_prune_and_train_another_task(capsys, pictures):
    lrk_run("train", "method=lora", "task=tiny_topic", *QUICK, *TRAIN, "train.learning_rate=1e-2")
    scored = lrk_run("score", "score.level=module", "score.batch=4")
    record = scored.read_json("scores.json")
    assert (record["level"], record["kind"], len(record["modules"])) == ("module", "ablation", 42)
    for entry in record["modules"]:
        gone, alone = record["whole"] - entry["without"][0], entry["alone"][0] - record["bare"]
        assert entry["scores"][0] == pytest.approx(gone + alone, abs=1e-9)
    assert "prune.keep=2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"scored modules, but ranks are to be taken out; first: lrk score run=.*=rank"):
        lrk_run("prune", f"run={scored.path}", "prune.drop=3")

    pruned = lrk_run("prune", f"run={scored.path}", "prune.keep=2")
    found = yaml.safe_load((pruned.path / "setting.yaml").read_text())
    for layer in range(6):
        own = [entry for entry in record["modules"] if entry["layer"] == layer]
        own.sort(key=lambda entry: -entry["scores"][0])
        assert set(found["layers"][layer]) == {entry["role"] for entry in own[:2]}
    assert found["name"] == "ablation keep=2" and found["source"]["task"] == "tiny_topic"
    assert (pruned.metrics["modules"], pruned.metrics["modules_before"]) == (12, 42)
    assert (pruned.path / "plots" / "setting.png").is_file()
    out = capsys.readouterr().out
    assert "kept 12 of 42 modules (ablation keep=2)" in out and re.search(
        r"lrk train method=fanlora method.setting=\S+ model=llama\n", out
    )

    selection = shutil.copy(pruned.path / "setting.yaml", "found.yaml")
    trained = lrk_run("train", "method=fanlora", f"method.setting={selection}", "task=tiny_yesno", *QUICK, *TRAIN)
    assert trained.metrics["modules"] == 12
    Path(selection).unlink()  # the run holds its modules
    again = lrk_run("evaluate", f"run={trained.path}")
    assert again.metrics["test/accuracy"] == trained.metrics["test/accuracy"]
    Path("other.yaml").write_text("layers: {all: [V]}")
    with pytest.raises(
        UserError, match=r"method.setting: .*other.yaml, but '.*' was made with .*found.yaml; leave it o"
    ):
        compose("evaluate", [f"run={trained.path}", "method.setting=other.yaml"])
    with pytest.raises(UserError, match=r"method.match_parameters: False, but '.*' was made with True"):
        compose("evaluate", [f"run={trained.path}", "method.match_parameters=false"])
    lrk_run("score", f"run={trained.path}", "score.level=module", "score.kind=magnitude")
    assert "prune.keep=1" in capsys.readouterr().out, "two modules a layer leave one to keep"


@pytest.mark.slow
def test_a_setting_in_one_command_and_its_controls():
    trained = lrk_run("train", "method=lora", "task=tiny_topic", *QUICK, *TRAIN)
    layers = []
    for seed in (1, 1, 2):
        controls = ["score.kind=random", f"seed={seed}", "prune.keep_total=9", "name=control"]
        run = lrk_run("prune", f"run={trained.path}", *controls)
        selection = yaml.safe_load((run.path / "setting.yaml").read_text())
        layers.append(selection["layers"])
        assert (selection["name"], selection["kind"]) == ("control", "random")
        assert sum(map(len, selection["layers"].values())) == 9 and all(selection["layers"].values())
    assert layers[0] == layers[1] != layers[2]


@pytest.mark.slow
def test_a_setting_names_the_layers_that_keep_nothing():
    lrk_run("train", "method=lora", "task=tiny_topic", *QUICK, *TRAIN, "method.target_modules=[V]")
    few = lrk_run("prune", "score.kind=magnitude", "prune.keep_total=4", "prune.per_layer=false")
    again = lrk_run("prune", f"run={few.path}", "score.kind=random", "prune.keep_total=2", "prune.per_layer=false")
    layers = read(again.path / "setting.yaml").layers
    assert list(layers) == list("012345") and sorted(map(len, layers.values())) == [0, 0, 0, 0, 1, 1]
    selection = f"method.setting={again.path / 'setting.yaml'}"
    trained = lrk_run("train", "method=fanlora", selection, "task=tiny_yesno", *QUICK, *TRAIN, "method.rank=1")
    assert trained.metrics["modules"] == 2


@pytest.mark.slow
def test_instructions_with_empty_and_with_long_answers_are_learned():
    rows = [{"instruction": f"Say {n}.", "input": "", "output": " ".join(["word"] * (n % 3) * 200)} for n in range(30)]
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ["task.max_length=48", "task.max_new_tokens=4"]
    run = lrk_run("train", "method=lora", "task=alpaca", "task.path=data", *short, *QUICK, *TRAIN)
    assert run.metrics["test/examples"] == 2 and run.metrics["dev/loss"] > 0


def test_a_recipe_ends_with_its_tasks_by_method(add_run):
    runs = [
        ("instruct", add_run("train", "lora", "tiny_topic", 0.9)),
        ("frozen", add_run("evaluate", "none", "tiny_yesno", 0.51)),
        ("lora", add_run("train", "lora", "tiny_yesno", 0.875, trainable_parameters=1000)),
        ("fanlora", add_run("train", "fanlora", "tiny_yesno", 0.9375, trainable_parameters=1010)),
        ("later", None),
    ]
    out = printed(learned(runs))
    assert out[1].split() == ["task", "metric", "none", "lora", "fanlora"]
    assert out[2].split() == ["tiny_yesno", "test/accuracy", "0.5100", "0.8750", "0.9375"]
    assert out[3].split() == ["trainable", "parameters", "–", "1k", "1.01k"]
    assert len(out) == 4
    assert printed(learned(runs[:1])) == []
    again = printed(learned([*runs, ("wider", add_run("train", "fanlora", "tiny_yesno", 0.95))]))
    assert again[1].endswith("fanlora (wider)") and again[2].split()[-2:] == ["0.9375", "0.9500"]


@pytest.fixture
def add_run():
    def add(stage, method, task, value, **metrics):
        choices = {"method": method, "model": "llama", "task": task}
        run = Run.create(
            "outputs", stage=stage, config={}, choices=choices, overrides=[], command="lrk", status="pending"
        )
        run.finish({"test/accuracy": value, **metrics})
        return run

    return add


def printed(renderables):
    console = Console(file=io.StringIO(), width=100)
    for item in renderables:
        console.print(item)
    return console.file.getvalue().splitlines()
