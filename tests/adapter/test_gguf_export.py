"""GGUF for llama.cpp: read back by transformers, and where there is one by llama.cpp itself."""

from pathlib import Path

import pytest
import small
import torch
from llama_cpp_process import llama_cpp
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lowrank_cli.adapter.files import gguf_export
from lowrank_cli.adapter.files.export import as_lora
from lowrank_cli.adapter.files.gguf_export import LORA_FILE, MODEL_FILE, save_lora_gguf, save_merged_gguf
from lowrank_cli.errors import UserError

gguf = pytest.importorskip("gguf")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TEXTS = ["ab abc", "a  b", "cab"]


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of GPT-2's kind, for models with 64 tokens."""
    letters = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "abc", "Ġab", "Ġabc"]
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "ab"), ("Ġ", "abc")]
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def mixed(family: str):
    """A LoRA whose modules differ in rank, and the model's logits (B, T, V) with it."""
    adapter = small.adapted("lora", family)
    with torch.no_grad():
        first = next(iter(adapter.modules.values()))
        first.resize(torch.arange(2), 0)
    adapter.model.eval()
    return adapter, adapter.model(input_ids=small.ids()).logits.detach()


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF file."""
    found = gguf.GGUFReader(file).tensors
    return {item.name: torch.tensor(item.data.copy()).reshape(*reversed(item.shape.tolist())) for item in found}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_read_back_with_its_logits_and_a_lora_is_its_change(family, tmp_path):
    save_tokenizer(tmp_path)
    adapter, expected = mixed(family)
    loras, _ = as_lora(adapter, None)
    assert len({len(a) for _, a in loras.values()}) > 1
    save_lora_gguf(adapter, loras, tmp_path / LORA_FILE)
    save_merged_gguf(adapter, tmp_path)
    # transformers does not read the width of Qwen 3's heads
    config = {"config": adapter.model.config} if family == "qwen3" else {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=MODEL_FILE, dtype=torch.float32, **config).eval()
    torch.testing.assert_close(loaded(input_ids=small.ids()).logits, expected, atol=1e-4, rtol=1e-4)

    (tmp_path / "base").mkdir()
    save_tokenizer(tmp_path / "base")
    bare = small.adapted("lora", family, trained=False)  # changes nothing
    save_merged_gguf(bare, tmp_path / "base")
    before, after, lora = (
        tensors(tmp_path / "base" / MODEL_FILE),
        tensors(tmp_path / MODEL_FILE),
        tensors(tmp_path / LORA_FILE),
    )
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[0] for name in lora} == changed
    for name in changed:
        change = lora[f"{name}.lora_b"] @ lora[f"{name}.lora_a"]
        torch.testing.assert_close(change, after[name] - before[name], atol=1e-5, rtol=1e-4)


def test_a_lora_has_the_scale_one_for_every_rank(tmp_path):
    adapter, _ = mixed("gpt2")
    save_lora_gguf(adapter, as_lora(adapter, None)[0], tmp_path / LORA_FILE)
    fields = gguf.GGUFReader(tmp_path / LORA_FILE).fields
    known = {key: fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert known == {"general.type": "adapter", "general.architecture": "gpt2", "adapter.type": "lora"}
    assert fields["adapter.lora.alpha"].contents() == 0
    assert tensors(tmp_path / LORA_FILE)["blk.0.attn_qkv.weight.lora_b"].shape[0] == 96


def test_rotary_frequencies_of_llama_3_are_written_as_factors():
    model = small.model("llama")
    assert gguf_export.rope_factors(model) is None
    model.config.rope_parameters = LLAMA3
    scaled = type(model)(model.config)
    factors = gguf_export.rope_factors(scaled)
    assert factors[0] == 1 and factors[-1] == pytest.approx(8)
    torch.testing.assert_close(factors * scaled.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_what_is_not_written_is_refused(tmp_path, monkeypatch):
    for family, reason in (("opt", "and this model is opt"), ("bert", "a bert with a classification head")):
        adapter = small.adapted("lora", family)
        with pytest.raises(UserError, match=f"export.format: gguf is written for llama, mistral, .*{reason}"):
            save_lora_gguf(adapter, as_lora(adapter, None)[0], tmp_path / LORA_FILE)
    adapter = small.adapted("lora", "gemma")
    with pytest.raises(UserError, match="is written for llama, mistral, qwen2, qwen3, and this model is gemma"):
        save_merged_gguf(adapter, tmp_path)
    adapter = small.adapted("lora", "llama")
    with pytest.raises(
        UserError, match=r"with a tokenizer of GPT-2, SmolLM, Llama 3 or Qwen 2.*format=merged, and conv"
    ):
        save_merged_gguf(adapter, tmp_path)
    save_tokenizer(tmp_path)
    with monkeypatch.context() as smaller:
        smaller.setattr(adapter.model.config, "vocab_size", 30)
        with pytest.raises(UserError, match=r"this model has 30, none for the tokenizer's token 33; set"):
            save_merged_gguf(adapter, tmp_path)
    adapter.model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    adapter.model.model.rotary_emb = type(adapter.model.model.rotary_emb)(adapter.model.config)
    with pytest.raises(UserError, match=r"rotary embeddings of this model \(rope_type yarn\)"):
        save_merged_gguf(adapter, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lowrank-cli\[gguf\]'"):
        save_lora_gguf(adapter, {}, tmp_path / LORA_FILE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [*FAMILIES, "llama with scaled frequencies"])
def test_llama_cpp_computes_the_same(family, tmp_path, monkeypatch):
    if family not in FAMILIES:
        config = {**small.GATED, "rope_parameters": LLAMA3}
        monkeypatch.setitem(small.FAMILIES, family, lambda: small.LlamaForCausalLM(small.LlamaConfig(**config)))
    for folder in ("base", "merged"):
        (tmp_path / folder).mkdir()
        save_tokenizer(tmp_path / folder)
    save_merged_gguf(small.adapted("lora", family, trained=False), tmp_path / "base")
    adapter, _ = mixed(family)
    ids = small.ids(1, 40)
    expected = adapter.model(input_ids=ids).logits[0].log_softmax(-1).detach()
    save_lora_gguf(adapter, as_lora(adapter, None)[0], tmp_path / LORA_FILE)
    save_merged_gguf(adapter, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    for model, lora in (("merged", None), ("base", tmp_path / LORA_FILE)):
        actual, tokens = llama_cpp(tmp_path / model / MODEL_FILE, ids[0].tolist(), TEXTS, lora)
        assert tokens == texts
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
