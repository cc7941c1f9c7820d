"""What every method, recipe and config file must satisfy; each enters by existing."""

from dataclasses import fields
from pathlib import Path

import pytest
import small
import torch
import yaml

from lowrank_cli import methods
from lowrank_cli.adapter import state
from lowrank_cli.config.composition import compose
from lowrank_cli.dispatch import single
from lowrank_cli.errors import WorkFailed
from lowrank_cli.methods.protocol import Adapts
from lowrank_cli.runs import Run
from lowrank_cli.stages.train import Trainer

CONF = Path(__file__).parent.parent / "conf"
TRAINABLE = [name for name in methods.names() if methods.can(name, Adapts)]
#: What fits a method's own settings to models of width 32, where that is not the rank alone.
SETTING = Path(__file__).parent / "setting.yaml"
SMALL = {
    "fanlora": ["method.rank=4", f"method.setting={SETTING}"],
    "full": [],
    "moelora": ["method.rank=8", "method.experts=4", "method.k=2"],
}
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
QUICK = [
    "model=llama",
    "task=tiny_entailment",
    "task.limit=16",
    "hardware.threads=1",
    "train.max_steps=4",
    "train.batch_size=8",
    "train.log_every=1",
    "train.eval_every=2",
    "train.checkpoint_every=2",
]


def adapted(name: str, family: str = "llama", trained: bool = False):
    """A model adapted with the settings of the method's own YAML, but small."""
    config = compose("train", [f"method={name}", *SMALL.get(name, ["method.rank=4"])]).config.method
    torch.manual_seed(3)
    adapter = methods.create(config).adapt(small.model(family))
    if trained:
        with torch.no_grad():
            for parameter in adapter.trained.values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return adapter


def history(run: Run) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "train/seconds"} for row in run.history()]


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_a_config_file_that_sets_every_field(name):
    values = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text())
    assert values.pop("defaults") == [f"_{name}"]
    assert values.keys() == {field.name for field in fields(methods.config_classes()[name])}
    assert values["name"] == name


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_fresh_adapter_is_exactly_the_bare_model(name, family):
    before = small.model(family)(input_ids=small.ids()).logits
    assert torch.equal(adapted(name, family).model(input_ids=small.ids()).logits, before)


@pytest.mark.parametrize("name", TRAINABLE)
def test_saving_and_loading_is_exact(name, tmp_path):
    adapter = adapted(name, trained=True)
    state.save(adapter, tmp_path, {})
    fresh = adapted(name)
    state.load(fresh, tmp_path)
    assert torch.equal(fresh.model(input_ids=small.ids()).logits, adapter.model(input_ids=small.ids()).logits)


@pytest.mark.parametrize("name", TRAINABLE)
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
@pytest.mark.parametrize("name", TRAINABLE)
def test_every_method_trains_resumes_and_evaluates(name, monkeypatch):
    overrides = [*QUICK, f"method={name}"]
    single.start("train", overrides, None, "lrk train")
    whole = Run.open(Path("outputs/latest").resolve())
    single.start("evaluate", [f"run={whole.path}"], None, "lrk evaluate")
    assert Run.open("outputs/latest").metrics["test/accuracy"] == whole.metrics["test/accuracy"]
    assert whole.metrics["trainable_parameters"] >= whole.metrics["activated_parameters"] > 0
    before = state.load_file(whole.path / "adapter" / state.WEIGHTS)

    take_step = Trainer._step

    def failing(trainer, step):
        if step == 4:
            raise WorkFailed("the power went out")
        return take_step(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", failing)
        with pytest.raises(WorkFailed, match="power"):
            single.start("train", overrides, None, "lrk train")
    broken = Run.open(Path("outputs/latest").resolve())
    single.resume("train", str(broken.path))
    assert history(Run.open(broken.path)) == history(whole)
    after = state.load_file(broken.path / "adapter" / state.WEIGHTS)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes(name):
    parts = single.preview("run", [f"recipe={name}"], None)
    assert parts
    assert (CONF / "recipe" / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_bundled_model_runs(name):
    parts = single.preview("run", [f"recipe={name}"], None)
    if not all(composed.config.model.bundled for _, composed in parts):
        pytest.skip("needs a pretrained checkpoint from the Hub")
    quick = ["task.limit=16", "hardware.threads=1", "train.max_steps=2", "train.batch_size=4", "train.eval_every=1"]
    single.start("run", [f"recipe={name}", *quick], None, "lrk run")
    stages = [Run.open(path.parent) for path in sorted(Path("outputs/latest").glob("*/run.json"))]
    assert len(stages) == len(parts)
    assert all(run.done for run in stages)


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(CONF.glob("*/*.yaml")) if p.parent.name != "recipe"],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_config_file_composes_and_says_what_it_is(path):
    assert path.read_text().startswith("# "), "the first line is what lrk list shows"
    group = path.parent.name
    verb = "evaluate" if (group, path.stem) == ("method", "none") else "train"
    composed = compose(verb, [f"{group}={path.stem}"])
    assert composed.choices[group] == path.stem
    assert getattr(composed.config, group).name == path.stem
