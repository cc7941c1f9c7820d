"""Runs on images: learning, and every method that needs no prompt through train, score, prune, export and resume."""

from pathlib import Path

import image_encoders
import pytest
import torch
import transformers
from resuming import history, train_broken_at

from lowrank_cli import methods
from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run
from lowrank_cli.methods.protocol import Adapts
from lowrank_cli.runs import Run

FEW_STEPS = "task.limit=12 train.max_steps=4 train.batch_size=8 train.eval_every=2 train.checkpoint_every=2".split()
#: Settings without which a method does not fit a model of two layers.
FITTING = {"fanlora": [f"method.setting={Path(__file__).parents[1] / 'setting.yaml'}"], "peft": ["method.type=vera"]}
PROMPTED = ["milora"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    image_encoders.model(root / "vit")
    image_encoders.images(root / "shapes", {"train": 40, "validation": 8, "test": 12})
    return ["model=vit_base", f"model.path={root / 'vit'}", "task=image_folder", f"task.path={root / 'shapes'}"]


def ran(verb: str, *overrides: str) -> Run:
    single_run.start(verb, list(overrides), None, f"lrk {verb}")
    return Run.open(Path("outputs/latest").resolve())


def test_an_encoder_learns_shapes(demo):
    run = ran("train", "method=lora", *demo, "train.epochs=99", "train.max_steps=120")
    assert run.metrics["test/accuracy"] > 0.6, "chance is 0.25"
    again = ran("evaluate", f"run={run.path}")
    assert again.metrics["test/accuracy"] == run.metrics["test/accuracy"]
    assert again.file("predictions.jsonl").read_text() == run.file("predictions.jsonl").read_text()
    merged = ran("export", f"run={run.path}", "export.format=merged").path / "export"
    model = transformers.AutoModelForImageClassification.from_pretrained(merged).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(merged)
    picture = Path(demo[3].removeprefix("task.path=")) / "test" / "square" / "0.png"
    with torch.no_grad():
        logits = model(**processor(transformers.image_utils.load_image(str(picture)), return_tensors="pt")).logits
    (line,) = (line for line in run.file("predictions.jsonl").read_text().splitlines() if "test/square/0.png" in line)
    assert f'"prediction": "{model.config.id2label[logits.argmax().item()]}"' in line


@pytest.mark.parametrize("name", [name for name in methods.names() if methods.can(name, Adapts)])
def test_every_method_trains_and_exports_or_says_why_not(name, demo, monkeypatch):
    monkeypatch.setattr("lowrank_cli.report.plots.draw", lambda run: None)
    train = [f"method={name}", *demo, *FEW_STEPS, *FITTING.get(name, [])]
    if name in PROMPTED:
        with pytest.raises(UserError, match="chooses modules by the tokens of a prompt, and vit_base reads images"):
            ran("train", *train)
        return
    run = ran("train", *train)
    assert run.metrics["activated_parameters"] > 0
    if "export" in methods.capabilities(name):
        form = "merged" if name == "full" else "lora"
        assert ran("export", f"run={run.path}", f"export.format={form}").metrics["export/logit_error"] < 1e-4


def test_ranks_are_scored_and_pruned(demo, monkeypatch):
    monkeypatch.setattr("lowrank_cli.report.plots.draw", lambda run: None)
    trained = ran("train", "method=lora", *demo, *FEW_STEPS)
    scored = ran("score", f"run={trained.path}", "score.kind=ab")
    pruned = ran("prune", f"run={scored.path}", "prune.drop=5")
    assert pruned.metrics["trainable_parameters"] < trained.metrics["trainable_parameters"]
    assert ran("evaluate", f"run={pruned.path}").metrics["test/accuracy"] == pruned.metrics["test/accuracy"]


def test_a_broken_training_resumes_bit_for_bit(demo, monkeypatch):
    monkeypatch.setattr("lowrank_cli.report.plots.draw", lambda run: None)
    train = ["method=alora", *demo, *FEW_STEPS]
    whole, resumed = ran("train", *train), train_broken_at(4, train)
    assert history(resumed) == history(whole)
    names = ("adapter_model.safetensors", "canary.safetensors")
    one, other = ([(run.path / "adapter" / name).read_bytes() for name in names] for run in (whole, resumed))
    assert one == other


def test_a_model_without_layers_and_a_width_of_its_own(demo, tmp_path):
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model = [f"model.path={tmp_path}", "method.target_modules=[pwconv1,pwconv2]"]
    run = ran("train", "method=lora", *demo[:1], *demo[2:], *model, *FEW_STEPS, "test=false")
    assert run.metrics["trainable_parameters"] > 0


def test_pixels_have_the_precision_of_weights(demo, tmp_path):
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    run = ran(
        "train", "method=lora", *demo[:1], *demo[2:], f"model.path={tmp_path}", "hardware.precision=bf16", *FEW_STEPS
    )
    assert ran("evaluate", f"run={run.path}").metrics["test/accuracy"] == run.metrics["test/accuracy"]


def test_a_processor_that_makes_other_sizes_is_refused(demo, tmp_path, lrk):
    image_encoders.model(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    ended = lrk("train", "method=lora", *demo[:1], *demo[2:], f"model.path={tmp_path}")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "the image processor of" in ended.err and "(48*48) doesn't match model (32*32)" in ended.err


def test_a_plan_counts_patches(demo, lrk):
    shown = lrk("check", "train", "method=lora", *demo, "--memory", "1").out
    assert "160 examples, about 25,600 tokens" in shown
    assert "the patches of an image" in shown
