"""Models: where a checkpoint is looked for, what is loaded, and one line for each way it can be absent or wrong."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from checkpoints import config, hardware, refused
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging

from lowrank_cli.adapter.target_sites import find_sites
from lowrank_cli.errors import UserError
from lowrank_cli.models import load as module
from lowrank_cli.models.load import Head, load, locate
from lowrank_cli.schema import ModelConfig, TaskConfig, check_task

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "yes", "no"]
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
FEED = {"intermediate_size": 16}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, **FEED, **IDS),
    "gpt2": transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=32, **IDS),
    "opt": transformers.OPTConfig(**SMALL, **IDS, ffn_dim=16, word_embed_proj_dim=8, max_position_embeddings=32),
    "bert": transformers.BertConfig(**SMALL, **FEED, max_position_embeddings=32, pad_token_id=0),
    "roberta": transformers.RobertaConfig(**SMALL, **FEED, max_position_embeddings=34, pad_token_id=1),
    "t5": transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=16),
}


def tokenizer(**special) -> transformers.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder of tiny checkpoints with random weights, one a family."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name, made in CONFIGS.items():
        factory = {"bert": transformers.AutoModel, "roberta": transformers.AutoModelForMaskedLM}.get(
            name, transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
        )
        factory.from_config(made).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def llama(checkpoints, tmp_path):
    """A copy of the Llama checkpoint, to be spoilt."""
    return Path(shutil.copytree(checkpoints / "llama", tmp_path / "llama"))


@pytest.mark.parametrize(("name", "positions"), [("llama", None), ("gpt2", 32), ("opt", 32)])
def test_causal_models(checkpoints, name, positions):
    loaded = load(config(path=str(checkpoints / name)), hardware(), None)
    assert loaded.max_positions == positions
    assert loaded.tokenizer.pad_token == "</s>", "this tokenizer has none of its own"
    assert loaded.model.config.pad_token_id == loaded.model.generation_config.pad_token_id == 2
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    family = {"llama": "Llama", "gpt2": "GPT2", "opt": "OPT"}[name]
    assert loaded.header == f"{checkpoints / name}: 0.0M-parameter {family}"
    ids = torch.tensor([[1, 4, 5] * 10])
    assert loaded.model(input_ids=ids).logits.shape == (1, 30, 16)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_encoders_get_a_head_that_follows_torchs_seed(checkpoints, name):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        loaded = load(config(kind="encoder", path=str(checkpoints / name)), hardware(), Head(("a", "b", "c")))
        head = dict(loaded.model.classifier.named_parameters())
        heads.append(torch.cat([value.flatten() for value in head.values()]))
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert loaded.model.config.num_labels == 3 and loaded.max_positions == 32
    ids = torch.full((1, loaded.max_positions), 4)
    assert loaded.model(input_ids=ids).logits.shape == (1, 3)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("autocast", torch.float32), ("bf16", torch.bfloat16)],
)
def test_precision(checkpoints, precision, dtype):
    assert load(config(path=str(checkpoints / "llama")), hardware(precision), None).model.dtype == dtype


def test_attention_that_a_model_lacks_is_refused_before_weights_are_read(llama, monkeypatch):
    (llama / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_supports_sdpa", False)
    with pytest.raises(UserError, match=r"attention: sdpa is not supported by 'llama' \(allowed: auto, flash, eager\)"):
        load(config(path=str(llama)), replace(hardware(), attention="sdpa"), None)


def test_loading_is_quiet_and_leaves_the_log_as_it_was(checkpoints, capfd):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(config(kind="encoder", path=str(checkpoints / "bert")), hardware(), Head(("a", "b")))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_what_does_not_fit_is_refused_before_weights_are_read(llama):
    (llama / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="no linear of this model is called 'nonsense'"):
        load(config(path=str(llama)), hardware(), None, [partial(find_sites, targets=["nonsense"])])


def test_sharded_checkpoint(llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    (llama / "model.safetensors").unlink()
    model.save_pretrained(llama, max_shard_size="2KB")
    shards = sorted(llama.glob("model-*.safetensors"))
    assert len(shards) > 1
    again = load(config(path=str(llama)), hardware(), None).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    shards[-1].unlink()
    refused(rf"^model\.path: .* lacks {shards[-1].name}$", config(path=str(llama)))


def test_folder_comes_before_the_bundled_model_and_the_hub(llama):
    found = locate(config(path=str(llama), bundled=True, id="someone/model"))
    assert found.source == str(llama) and found.local
    header = load(config(path=str(llama), bundled=True), hardware(), None).header
    assert header.startswith(str(llama))


def test_bundled_model_names_the_papers(llama, monkeypatch):
    monkeypatch.setattr(module, "BUNDLED", llama)
    header = load(config(bundled=True), hardware(), None).header
    assert header == "bundled 0.0M-parameter Llama; for the paper's: model=llama2_7b"
    monkeypatch.setattr(module, "BUNDLED", llama / "absent")
    refused("^model: the bundled checkpoint: no such folder$", config(bundled=True))


def test_folders_that_hold_no_model(llama, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for path, message in [
        ("absent", "absent: no such folder"),
        ("llama/config.json", "llama/config.json: is a file, not a folder"),
        ("empty", "empty holds no config.json"),
        (".", r"\. holds no config.json; did you mean its folder 'llama'\?"),
        ("adapter", "adapter is an adapter, not a model; name its run with run=PATH"),
    ]:
        refused(rf"^model\.path: {message}$", config(path=path))


def test_pickled_weights_are_not_read(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(r"^model\.path: .* holds pickled weights only", config(path=str(llama)))


def test_damaged_checkpoints(llama):
    weights = llama / "model.safetensors"
    whole = weights.read_bytes()
    for spoilt in (whole[:-100], whole[:4], b""):
        weights.write_bytes(spoilt)
        refused(r"^model: .*llama cannot be loaded: ", config(path=str(llama)))
    weights.write_bytes(whole)
    for text, message in (("{", "cannot be read as JSON"), ("[]", "expected keys with values")):
        (llama / "config.json").write_text(text)
        refused(rf"^model: .*llama/config\.json.* {message}", config(path=str(llama)))


def test_checkpoint_that_lacks_weights(llama):
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    refused(r"lacks 1 weights of LlamaForCausalLM, such as model\.layers\.0\.mlp\.up_proj", config(path=str(llama)))


def test_checkpoint_of_another_shape(llama):
    settings = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**settings, "intermediate_size": 12}))
    refused(
        r"^model: .* made holds model\.layers\.0\.mlp\.down_proj\.weight as \(8, 16\), .* asks for \(8, 12\)$",
        config(path=str(llama)),
    )


def test_head_for_other_labels_is_replaced(tmp_path):
    settings = transformers.BertConfig(**SMALL, **FEED, pad_token_id=0, num_labels=5)
    made = transformers.AutoModelForSequenceClassification.from_config(settings)
    made.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load(config(kind="encoder", path=str(tmp_path)), hardware(), Head(("a", "b"))).model
    assert model.classifier.weight.shape == (2, 8)
    assert torch.equal(model.bert.pooler.dense.weight, made.bert.pooler.dense.weight)


def test_checkpoint_with_code_of_its_own(llama):
    settings = json.loads((llama / "config.json").read_text())
    settings.update(model_type="custom", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (llama / "config.json").write_text(json.dumps(settings))
    refused("comes with Python code of its own; set model.trust_remote_code=true", config(path=str(llama)))


def test_tokenizer_that_does_not_fit(llama):
    (llama / "tokenizer.json").unlink()
    refused(r"^model: the tokenizer of .*llama cannot be loaded: ", config(path=str(llama)))
    made = tokenizer()
    made.add_tokens([f"more{number}" for number in range(20)])
    made.save_pretrained(llama)
    refused("^model: made has 26 tokens but only 16 embeddings$", config(path=str(llama)))
    tokenizer(eos_token=None).save_pretrained(llama)
    refused("names no end-of-sequence token$", config(path=str(llama)))


def test_kinds_must_agree(checkpoints):
    refused(
        r"^model\.kind: causal does not fit .* \(bert\); set model.kind=encoder$",
        config(path=str(checkpoints / "bert")),
    )
    encoder = config(kind="encoder", path=str(checkpoints / "llama"))
    refused(r"^model\.kind: encoder does not fit .* \(llama\); set model.kind=causal$", encoder, Head(("a", "b")))
    refused(r"is an encoder-decoder \(t5\)", config(path=str(checkpoints / "t5")))


def test_encoders_answer_labels_only():
    check_task(config(kind="encoder"), TaskConfig(name="made", answer="labels"))
    check_task(config(), TaskConfig(name="made", answer="free"))
    for answer in ("choices", "free"):
        with pytest.raises(UserError, match=rf"^model\.kind: .*task=made has task\.answer={answer}"):
            check_task(config(kind="encoder"), TaskConfig(name="made", answer=answer))


def test_hub_out_of_reach_is_one_line_within_seconds():
    start = time.monotonic()
    refused(
        r"^model\.id: 'meta-llama/Llama-2-7b-hf' is not in the local cache and the Hub cannot be reached \(.*\); "
        r"use model=llama \(bundled\), set model\.path=FOLDER or model\.gguf=FILE, or connect",
        config(id="meta-llama/Llama-2-7b-hf"),
    )
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (GatedRepoError, r"^model\.id: 'a/b' is gated: accept its licence .* `hf auth login`"),
        (RepositoryNotFoundError, r"^model\.id: no model 'a/b' on the Hub, or it is private"),
        (RevisionNotFoundError, r"^model\.revision: 'a/b' has no revision 'v9'$"),
        (TimeoutError, r"the Hub cannot be reached \(Answer\)"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, family, message):
    class Answer(family):
        def __init__(self):
            Exception.__init__(self, "two\nlines")

    def refuse(*args, **kwargs):
        raise Answer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    refused(message, config(id="a/b", revision="v9"))


def test_gated_models_are_tried_before_loading(monkeypatch):
    class Gated(GatedRepoError):
        def __init__(self):
            Exception.__init__(self, "gated")

    def refuse(*args, **kwargs):
        raise Gated

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: type("Info", (), {"gated": "manual"}))
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refuse)
    refused(r"^model\.id: 'a/b' is gated", config(id="a/b"))


def test_cached_models_need_no_network(checkpoints, monkeypatch, tmp_path):
    repository = tmp_path / "models--a--b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    snapshot = shutil.copytree(checkpoints / "llama", repository / "snapshots" / "c0ffee")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert locate(config(id="a/b")).source == str(snapshot)
    loaded = load(config(id="a/b"), hardware(), None)
    assert loaded.header == "a/b: 0.0M-parameter Llama"
    assert loaded.model.config.name_or_path == "a/b", "adapters name their base by it"
    (snapshot / "model.safetensors").unlink()
    refused("not in the local cache", config(id="a/b"))


def test_every_model_file_fits_the_schema_and_describes_itself():
    for file in CONF.glob("[!_]*.yaml"):
        assert file.read_text().startswith("# ")
        values = OmegaConf.merge(OmegaConf.load(CONF / "_base.yaml"), OmegaConf.load(file))
        del values["defaults"]
        if file.stem == "hub":  # names no model of its own
            assert OmegaConf.is_missing(values, "name") and values.id is None
            values.update(name="hub", id="some/model")
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
        made.validate()
        assert made.name == file.stem and made.bundled == (made.id is None)
