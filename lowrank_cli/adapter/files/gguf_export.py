"""Export to GGUF, the file format of llama.cpp: LoRAs and whole models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files.engines import Loras
from lowrank_cli.adapter.files.export import merge_into_model
from lowrank_cli.adapter.target_sites import head_names
from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_json

if TYPE_CHECKING:
    import gguf

LORA_FILE, MODEL_FILE = "adapter.gguf", "model.gguf"
#: llama.cpp's architecture by ``config.model_type``, for LoRAs.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
}
WHOLE = ("llama", "mistral", "qwen2", "qwen3")  #: model types that are also written whole
#: llama.cpp's ``llama`` rotates neighbouring features of Q and K, transformers those half a head apart.
INTERLEAVED = "llama"
CONVERTER = "export.format=merged, and convert it with convert_hf_to_gguf.py of llama.cpp"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
#: llama.cpp's name of a pre-tokenizer, by what splits text in front of byte-level BPE in ``tokenizer.json``.
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_LLAMA3 % "{1,3}",): "llama-bpe",
    (_LLAMA3 % "",): "qwen2",
}


def require(model: PreTrainedModel, types: tuple[str, ...] = tuple(ARCHITECTURES)) -> None:
    """Raise UserError unless the package ``gguf`` is installed and ``model`` is of one of ``types``."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("export.format: gguf needs the package gguf; pip install 'lowrank-cli[gguf]'")
    kind = model.config.model_type
    if kind not in types or head_names(model):
        what = f"a {kind} with a classification head" if head_names(model) else kind
        raise UserError(f"export.format: gguf is written for {', '.join(types)}, and this model is {what}")


@torch.no_grad()
def save_lora_gguf(adapter: Adapter, loras: Loras, file: Path) -> None:
    """Write ``loras`` as a GGUF adapter for llama.cpp.

    Its ``adapter.lora.alpha`` is 0, which llama.cpp takes as a scale of 1: a positive alpha would be divided by the
    rank of each module.

    Raises:
        UserError: llama.cpp has no such architecture, or no such linear in it.
    """
    require(adapter.model)
    import gguf

    writer, names = _writer(adapter.model, file)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    for path, (b, a) in loras.items():
        name = _name(names, f"{path}.weight")
        writer.add_tensor(f"{name}.lora_a", a.float().cpu().contiguous().numpy())  # (R, I)
        writer.add_tensor(f"{name}.lora_b", _rows(adapter.model, name, b.float().cpu()).numpy())  # (O, R)
    _write(writer)


@torch.no_grad()
def save_merged_gguf(adapter: Adapter, folder: Path) -> None:
    """Write the model with merged weights as GGUF, in its dtype, into ``folder``, which holds its tokenizer.

    The adapter is unusable afterwards.

    Raises:
        UserError: an architecture, a tokenizer or rotary embeddings that are not written.
    """
    model = adapter.model
    require(model, WHOLE)
    file = folder / "tokenizer.json"
    tokenizer: dict[str, Any] = read_json(file, dict[str, Any]) if file.is_file() else {}
    pre_tokenizer = _pre_tokenizer(tokenizer)
    import gguf

    writer, names = _writer(model, folder / MODEL_FILE)
    _add_settings(writer, model)
    _add_tokenizer(writer, folder, tokenizer, pre_tokenizer, model.config.vocab_size)
    merge_into_model(adapter)
    embedding = model.get_input_embeddings().weight
    for key, parameter in model.named_parameters():  # without a head that is tied to the embedding
        name, value = _name(names, key), parameter.float().cpu()
        kind = gguf.GGMLQuantizationType.BF16 if embedding.dtype == torch.bfloat16 and value.dim() > 1 else None
        data = _rows(model, name, value).numpy()
        writer.add_tensor(name, data if kind is None else gguf.quants.quantize(data, kind), raw_dtype=kind)
    if (factors := rope_factors(model)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())  # (D / 2,)
    _write(writer)


def _writer(model: PreTrainedModel, file: Path) -> tuple[gguf.GGUFWriter, gguf.TensorNameMap]:
    """A writer for ``model``'s architecture, and llama.cpp's names of its tensors."""
    import gguf

    name = ARCHITECTURES[model.config.model_type]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    return gguf.GGUFWriter(file, name), gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(names: gguf.TensorNameMap, key: str) -> str:
    """llama.cpp's name of a parameter."""
    name = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise UserError(f"export.format: gguf has no tensor for '{key}' of this architecture")
    return str(name)


def _rows(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """A weight (O, I), a bias (O,) or B of a LoRA (O, R), with the outputs in the order of llama.cpp."""
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": _key_heads(model)}.get(name.split(".")[-2])
    if heads is None or ARCHITECTURES[model.config.model_type] != INTERLEAVED:
        return tensor.contiguous()
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])  # (O, ...) -> (heads, 2, D / 2, ...)
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()  # -> (heads, D / 2, 2, ...) -> (O, ...)


def _key_heads(model: PreTrainedModel) -> int:
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads


def _rotary(model: PreTrainedModel) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """By what each rotary frequency (D / 2,) is divided in this model; None if by nothing."""
    theta, frequencies = model.config.rope_parameters["rope_theta"], _rotary(model).inv_freq
    assert isinstance(frequencies, Tensor)
    frequencies = frequencies.float().cpu()
    plain = 1 / theta ** (torch.arange(len(frequencies)).float() / len(frequencies))
    factors = plain / frequencies
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) else factors


def _add_settings(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """Add the keys from which llama.cpp builds the model."""
    import gguf

    config = model.config
    scaled = rope_factors(model) is not None
    if _rotary(model).attention_scaling != 1 or (scaled and ARCHITECTURES[config.model_type] != INTERLEAVED):
        raise UserError(
            f"export.format: gguf is not written for the rotary embeddings of this model "
            f"(rope_type {config.rope_parameters['rope_type']}); set {CONVERTER}"
        )
    dimension = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = model.dtype == torch.bfloat16
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_key_heads(model))
    writer.add_key_length(dimension)
    writer.add_value_length(dimension)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(dimension)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """llama.cpp's name of how a ``tokenizer.json`` splits text. Raises UserError if it has none."""
    before = content.get("pre_tokenizer") or {}
    steps = [step for step in before.get("pretokenizers", [before]) if step]
    key = tuple(
        step["pattern"].get("Regex", "") if step["type"] == "Split" else step["type"]
        for step in steps
        if step["type"] != "ByteLevel" or step.get("use_regex", True)
    )
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if not byte_level or content.get("model", {}).get("type") != "BPE" or key not in PRE_TOKENIZERS:
        raise UserError(
            f"export.format: gguf is written with a tokenizer of GPT-2, SmolLM, Llama 3 or Qwen 2, and this model has "
            f"another one; set {CONVERTER}"
        )
    return PRE_TOKENIZERS[key]


def _add_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, content: dict[str, Any], pre_tokenizer: str, vocabulary: int
) -> None:
    """Add the byte-level BPE in ``folder``, with unused tokens up to ``vocabulary``, and its special tokens.

    Args:
        content: its ``tokenizer.json``.
    """
    import gguf

    most = max([*content["model"]["vocab"].values(), *(added["id"] for added in content["added_tokens"])])
    if most >= vocabulary:
        raise UserError(
            f"export.format: gguf has an embedding for each token, and this model has {vocabulary}, none for the "
            f"tokenizer's token {most}; set {CONVERTER}"
        )
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [gguf.TokenType.UNUSED] * vocabulary
    for token, index in content["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary).add_to_gguf(writer)
