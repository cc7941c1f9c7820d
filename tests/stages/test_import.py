"""lrk import: what the PEFT library wrote computes the same as a run, whatever its options."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from command import lrk, one_line  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

import lowrank_cli as library
from lowrank_cli.models.load import BUNDLED
from lowrank_cli.runs import Run

peft = pytest.importorskip("peft", reason="the package peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft's own

IDS = torch.arange(3, 23).unsqueeze(0)
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"layers.[12].mlp.up_proj": 6},
    "alpha_pattern": {"v_proj": 5, "layers.0.self_attn.q_proj": 3},
}
OPTIONS = {
    "lora": {"lora_dropout": 0.1},
    "rslora": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"use_dora": True, "lora_alpha": 6},
    "patterns": {**PATTERNS, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "dora_patterns": {**PATTERNS, "use_dora": True, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "layers": {"layers_to_transform": [1, 3], "target_modules": ["q_proj"]},
    "regex": {"target_modules": r".*layers\.[24]\.self_attn\.[qk]_proj"},
    "all": {"target_modules": "all-linear"},
}


def made(folder, **options):
    """An adapter that PEFT wrote into ``folder``, filled with noise; returns its logits."""
    base = AutoModelForCausalLM.from_pretrained(BUNDLED)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


def logits(run):
    """Those of the bundled model with the adapter of a run."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    library.load(model, run)
    with torch.no_grad():
        return model.eval()(IDS).logits


def edited(folder, **changes):
    """Change keys of ``adapter_config.json``."""
    file = Path(folder, "adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_imported_adapter_computes_what_it_did(lrk, kind):  # noqa: F811
    expected = made("theirs", **OPTIONS[kind])
    ended = lrk("import", "theirs", "task=tiny_sentiment", "hardware.threads=1")
    assert ended.code == 0 and "warning" not in ended.err, ended
    torch.testing.assert_close(logits("outputs/latest"), expected, atol=2e-5, rtol=0)
    bare = AutoModelForCausalLM.from_pretrained(BUNDLED).eval()(IDS).logits
    assert (expected - bare).abs().max() > 0.05, "the adapter does something"
    run = Run.open("outputs/latest")
    config = run.config()
    assert config["method"]["name"] == ("dora" if "dora" in kind else "lora")
    assert config["method"]["dropout"] == (0.1 if kind == "lora" else 0.0)
    assert run.metrics["import/largest_rank"] == (6 if "patterns" in kind else 4)
    assert f"next: lrk evaluate run=outputs/{run.path.parent.name}" in ended.out


def test_a_converted_pissa_is_a_lora_and_another_one_is_refused(lrk):  # noqa: F811
    base = AutoModelForCausalLM.from_pretrained(BUNDLED)
    config = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained("start")
        model.peft_config["default"].init_lora_weights = "pissa"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        model.eval()
        with torch.no_grad():
            expected = model(IDS).logits
        model.save_pretrained("raw")
        model.save_pretrained("converted", path_initial_model_for_weight_conversion="start")
    assert "init_lora_weights=pissa, and lrk import takes init_lora_weights=True" in refused(lrk, "raw")
    assert lrk("import", "converted", "hardware.threads=1").code == 0
    torch.testing.assert_close(logits("outputs/latest"), expected, atol=5e-5, rtol=0)


def test_an_imported_run_is_one_like_others(lrk):  # noqa: F811
    made("theirs", rank_pattern={"v_proj": 2})
    quick = ("hardware.threads=1", "task.limit=8")
    assert lrk("import", "theirs", "task=tiny_sentiment", *quick, "name=mine").code == 0
    imported = Path("outputs/latest").resolve()
    for words in (["evaluate"], ["prune", "prune.drop=6", "score.batch=2"], ["export"], ["generate", "zorp"]):
        ended = lrk(*words, f"run={imported}", "hardware.threads=1")
        assert ended.code == 0, ended
    assert "test accuracy" in lrk("compare", "outputs").out.replace("test/", "test ")


def refused(lrk, *words):  # noqa: F811
    """The message of an import that fails after the model is loaded."""
    ended = lrk("import", *words, "hardware.threads=1")
    assert ended.code == 2 and not any(Path("outputs").glob("2*/*")), ended
    return ended.err.splitlines()[-1].removeprefix("error: ")


def test_another_base_is_noticed(lrk):  # noqa: F811
    made("theirs")
    edited("theirs", base_model_name_or_path="meta/other")
    ended = lrk("import", "theirs", "model=llama", "hardware.threads=1")
    assert ended.code == 0 and "warning: the adapter names 'meta/other' as its base; that this model" in ended.err
    shown = lrk("import", "theirs", "--dry-run").out
    assert "id: meta/other" in shown and "name: other" in shown, "without a model it is that base"
    own = lrk("train", "method=lora", "train.max_steps=1", "train.batch_size=2", "task.limit=8", "hardware.threads=1")
    assert own.code == 0
    adapter = Path("outputs/latest/adapter").resolve()
    Path("other").mkdir()
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained("other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("other", name).write_bytes((BUNDLED / name).read_bytes())
    ended = lrk("import", str(adapter), "model=hub", "model.path=other", "hardware.threads=1")
    assert ended.code == 2 and "this adapter belongs to another model" in ended.err, "one of ours knows its model"
    assert lrk("import", str(adapter), "hardware.threads=1").code == 0


def test_what_is_no_lora_of_linears_is_refused(lrk):  # noqa: F811
    made("theirs")
    for change, message in [
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save=['lm_head'], and lrk import takes"),
        ({"bias": "all"}, "has bias=all, and lrk import takes bias=none"),
        ({"r": 5}, "has rank 4, and adapter_config.json says 5"),
        ({"target_modules": ["q_proj"]}, "which method.target_modules leaves out"),
    ]:
        before = Path("theirs/adapter_config.json").read_text()
        edited("theirs", **change)
        assert message in refused(lrk, "theirs"), change
        Path("theirs/adapter_config.json").write_text(before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "import: name one adapter, a folder or ORG/NAME on the Hub, not 0"),
        (["a", "b"], "import: name one adapter, a folder or ORG/NAME on the Hub, not 2"),
        (["."], "holds no adapter_config.json, so it is no adapter of the PEFT library"),
        (["no/such/folder"], "adapter: there is no folder 'no/such/folder'"),
        (["wrong"], "wrong/adapter_config.json"),
    ],
)
def test_mistakes_are_one_line(lrk, words, message):  # noqa: F811
    Path("wrong").mkdir()
    Path("wrong/adapter_config.json").write_text('{"r": 0, "lora_alpha": 1}')
    assert message in one_line(lrk("import", *words))


def test_the_hub_is_asked_for_what_is_no_folder(lrk, monkeypatch):  # noqa: F811
    import huggingface_hub

    expected = made("theirs")

    def download(repository, name, revision=None):
        assert (repository, revision) == ("some/adapter", "v1")
        return str(Path("theirs", name).resolve())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: None)
    ended = lrk("import", "some/adapter", "revision=v1", "hardware.threads=1")
    assert ended.code == 0, ended
    torch.testing.assert_close(logits("outputs/latest"), expected, atol=2e-5, rtol=0)
    monkeypatch.undo()
    assert "there is no folder 'some/adapter', and the Hub cannot be reached" in lrk("import", "some/adapter").err
