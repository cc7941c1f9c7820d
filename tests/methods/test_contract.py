"""What every method, recipe and config file must satisfy; each enters by existing."""

import math
from dataclasses import fields
from itertools import chain
from pathlib import Path

import pytest
import small
import torch
import yaml
from ablations import dev_batch
from command import FOUR_STEPS
from resuming import history, train_broken_at

from lowrank_cli import methods
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.ranks import resize
from lowrank_cli.config.composition import Source, compose
from lowrank_cli.config.folders import description
from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run
from lowrank_cli.launch.stage import check
from lowrank_cli.methods.protocol import ChoosesSites
from lowrank_cli.runs import Run
from lowrank_cli.schema import SCORE_KINDS
from lowrank_cli.scoring.cut import usual
from lowrank_cli.scoring.probe import Probe
from lowrank_cli.scoring.rank_scores import require_ranks, score

CONF = Path(__file__).parents[2] / "conf"
FAMILIES = ["llama", "gpt2", "bert"]
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
#: Settings of methods that cost time alone: fewer examples to score on, fewer sets of demonstrations.
CHEAP = {"dev_batch": 2, "draws": 2}


def adapted(name: str, family: str = "llama", trained: bool = False, seed: int = 3):
    """A model adapted with the settings of the method's own YAML, but small; ``trained`` moves all that trains."""
    torch.manual_seed(seed)
    adapter = small.method(name).adapt(small.model(family))
    if trained:
        with torch.no_grad():
            for parameter in adapter.trained.values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return adapter


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_a_config_file_that_sets_every_field(name):
    values = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text())
    assert values.pop("defaults") == [f"_{name}"]
    assert values.keys() == {field.name for field in fields(methods.config_classes()[name])}
    assert values["name"] == name


@pytest.mark.parametrize("name", small.TRAINABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_exactly_the_bare_model(name, family):
    before = small.model(family)(input_ids=small.ids()).logits
    assert torch.equal(adapted(name, family).model(input_ids=small.ids()).logits, before)


@pytest.mark.parametrize("name", [name for name in small.TRAINABLE if methods.can(name, ChoosesSites)])
def test_sites_are_known_without_weights(name):
    with torch.device("meta"):
        outline = small.FAMILIES["llama"]()
    assert small.method(name).sites(outline) == list(adapted(name).sites.values())


@pytest.mark.parametrize("name", small.TRAINABLE)
def test_saving_and_loading_is_exact(name, tmp_path):
    adapter = adapted(name, trained=True)
    save_load.save(adapter, tmp_path, {})
    fresh = adapted(name, seed=4)
    save_load.load(fresh, tmp_path)
    assert torch.equal(fresh.model(input_ids=small.ids()).logits, adapter.model(input_ids=small.ids()).logits)


@pytest.mark.parametrize("name", small.TRAINABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_declared_parameters_train(name, family):
    adapter = adapted(name, family)
    model = adapter.model
    adapter.require_declared()
    declared = {id(p) for p in adapter.trained.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == declared
    frozen = {n: p.clone() for n, p in model.named_parameters() if id(p) not in declared}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=small.ids()).logits.square().mean().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[n]) for n, value in frozen.items())
    assert frozen or small.method(name).rewrites()


@pytest.mark.parametrize("name", small.TRAINABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_is_the_same_function_or_is_refused(name, family):
    adapter = adapted(name, family, trained=True)
    if methods.refusal(name, "export"):
        with pytest.raises(UserError, match=r"merge: .*, so no single weight equals them"):
            adapter.merge()
        return
    weights = {n: p.clone() for n, p in adapter.model.named_parameters()}
    logits = adapter.model(input_ids=small.ids()).logits
    adapter.merge()
    assert all(linear.merged for linear in adapter.linears.values())
    torch.testing.assert_close(adapter.model(input_ids=small.ids()).logits, logits, atol=1e-5, rtol=1e-4)
    adapter.unmerge()
    assert all(torch.equal(p, weights[n]) for n, p in adapter.model.named_parameters())


@pytest.mark.parametrize("name", small.TRAINABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_taken_out_is_a_rank_whose_gate_is_closed_or_pruning_is_refused(name, family):
    adapter = adapted(name, family, trained=True)
    if methods.refusal(name, "prune"):
        with pytest.raises(UserError, match="has no low-rank modules whose ranks add up"):
            require_ranks(adapter)
        return
    require_ranks(adapter)
    for part in adapter.modules.values():
        part.rank_gate = torch.arange(part.rank).gt(0).float()
    closed = adapter.model(input_ids=small.ids()).logits
    for part in adapter.modules.values():
        part.rank_gate = None
    assert not torch.equal(adapter.model(input_ids=small.ids()).logits, closed)
    resize(adapter, {key: (list(range(1, rank)), 0) for key, rank in adapter.ranks().items()})
    torch.testing.assert_close(adapter.model(input_ids=small.ids()).logits, closed, atol=1e-5, rtol=1e-4)
    adapter.require_declared()


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("name", [name for name in small.TRAINABLE if not methods.refusal(name, "score")])
def test_every_rank_gets_a_score(name, kind):
    adapter = adapted(name, trained=True)
    scores = score(kind, adapter, Probe(dev_batch("llama"), 300), usual(adapter, "rank", 0.1))
    assert {key: len(row) for key, row in scores.values.items()} == adapter.ranks()
    assert all(map(math.isfinite, chain(*scores.values.values())))


@pytest.mark.parametrize("name", methods.names())
def test_a_stage_is_planned_or_refused_in_one_line_before_weights_load(name):
    """What the method says that it cannot do is refused; everything else gets a plan."""
    can, source = methods.capabilities(name), None
    if "train" in can:
        made = check("train", [f"method={name}", "task=tiny_topic"], None)
        source = Source("run", made.resolved, made.choices)
    for stage in ("score", "prune", "export"):
        overrides = [f"method={name}", *(["prune.drop=1"] if stage == "prune" else [])]
        if stage in can:
            assert check(stage, overrides, None, source).config.method.name == name
            continue
        with pytest.raises(UserError) as error:
            check(stage, overrides, None, source)
        why = methods.refusal(name, stage)
        assert str(error.value).startswith(f"method: '{name}' has no {f'{stage}: {why}' if why else f'stage {stage}'}")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", small.TRAINABLE)
def test_weights_in_4_bits_are_planned_or_refused_in_one_line(name, lrk):
    ended = lrk("check", "train", "hardware=gpu_4bit", f"method={name}")
    if why := small.method(name).rewrites():
        assert ended.code == 2 and f"method={name} {why}" in ended.err and ended.err.count("\n") == 1
    else:
        assert ended.code == 0 and "frozen linears nf4" in ended.out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", small.TRAINABLE)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_peft_library_loads_what_is_said_to_load_there(name, family, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = adapted(name, family, trained=True)
    save_load.save(adapter, tmp_path, {})
    if not (tmp_path / save_load.CONFIG).exists():
        with pytest.raises(ValueError, match="Can't find"):
            peft.PeftModel.from_pretrained(small.model(family), tmp_path)
        return
    model = peft.PeftModel.from_pretrained(small.model(family), tmp_path).eval()
    expected = adapter.model(input_ids=small.ids()).logits
    torch.testing.assert_close(model(input_ids=small.ids()).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", small.TRAINABLE)
@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_the_cache_equals_decoding_without(name, beams):
    adapter = adapted(name, trained=True)
    settings = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    prompts = small.ids(3, 6)
    cached = adapter.model.generate(prompts, **settings)
    for row, made in zip(prompts, cached, strict=True):
        alone = adapter.model.generate(row.unsqueeze(0), **settings)[0]
        assert made[: len(alone)].tolist() == alone.tolist()
    prompt_mask = torch.zeros_like(cached)
    prompt_mask[:, :6] = 1
    extra = {"prompt_mask": prompt_mask} if adapter.routing else {}
    with torch.no_grad():
        logits = adapter.model(input_ids=cached, **extra).logits
    if beams == 1:
        ended = (cached[:, 6:] == 2).cumsum(dim=1) - (cached[:, 6:] == 2).long()  # after the first EOS: padding
        chosen = logits[:, 5:-1].argmax(dim=-1)
        assert torch.where(ended > 0, True, chosen == cached[:, 6:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", small.TRAINABLE)
def test_every_method_trains_resumes_and_evaluates(name):
    cheap = [f"method.{key}={value}" for key, value in CHEAP.items() if hasattr(small.config(name), key)]
    overrides = ["model=llama", *FOUR_STEPS, f"method={name}", *cheap]
    single_run.start("train", overrides, None, "lrk train")
    whole = Run.open(Path("outputs/latest").resolve())
    single_run.start("evaluate", [f"run={whole.path}"], None, "lrk evaluate")
    assert Run.open("outputs/latest").metrics["test/accuracy"] == whole.metrics["test/accuracy"]
    assert whole.metrics["trainable_parameters"] >= whole.metrics["activated_parameters"] > 0
    before = save_load.load_file(whole.path / "adapter" / save_load.WEIGHTS)
    resumed = train_broken_at(4, overrides)
    assert history(resumed) == history(whole)
    after = save_load.load_file(resumed.path / "adapter" / save_load.WEIGHTS)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_bundled_model_runs(name):
    planned = single_run.preview("run", [f"recipe={name}"], None)
    if not all(composed.config.model.bundled for _, composed in planned):
        pytest.skip("needs a pretrained checkpoint from the Hub")
    quick = ["task.limit=16", "hardware.threads=1", "train.max_steps=2", "train.batch_size=4", "train.eval_every=2"]
    used = [composed.config.method for _, composed in planned]
    quick += [f"method.{key}={value}" for key, value in CHEAP.items() if any(hasattr(method, key) for method in used)]
    quick += ["score.batch=2"] * any(composed.verb == "score" for _, composed in planned)
    single_run.start("run", [f"recipe={name}", *quick], None, "lrk run")
    stages = [Run.open(path.parent) for path in sorted(Path("outputs/latest").glob("*/run.json"))]
    assert len(stages) == len(planned)
    assert all(run.done for run in stages)


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in sorted(CONF.glob("*/*.yaml"))
        if p.parent.name not in ("recipe", "study") and not p.stem.startswith("_")
    ],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_config_file_composes_and_says_what_it_is(path):
    assert path.read_text().startswith("# ") and len(description(path)) > 5, "the first line is what lrk list shows"
    group = path.parent.name
    evaluated = group == "eval" or (group, path.stem) == ("method", "none")
    verb = "bench" if group == "bench" else "evaluate" if evaluated else "train"
    filled_in = {
        "model/hub": ["model.id=someone/something", "model.name=hub"],
        "task/image_folder": ["task.path=FOLDER", "task.label_words=[rose,tulip]"],
        "eval/lm_eval": ["method=none", "eval.tasks=[hellaswag]"],
    }
    composed = compose(verb, [f"{group}={path.stem}", *filled_in.get(f"{group}/{path.stem}", [])])
    assert composed.choices[group] == path.stem
    if group not in ("bench", "eval"):
        assert getattr(composed.config, group).name == path.stem
