"""A model without its weights, made from its configuration alone, for plans that must not download anything."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lowrank_cli.models import gguf
from lowrank_cli.models.load import BUNDLED, cached, factory_of, load_tokenizer, one_line, quiet
from lowrank_cli.schema import ModelConfig


def outline(model: ModelConfig, device: str = "meta", dtype: Any = None) -> Any | None:
    """The model on torch's meta device; None if its config.json is not on this machine.

    Args:
        device: another one if the caller makes fake tensors there.
        dtype: of the weights; None: as the configuration says.

    Raises:
        UserError: that file cannot be read.
    """
    folder = folder_of(model)
    if folder is None:
        return None
    import torch
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    # image encoders draw values again until all are in a range, which fake tensors never are
    bare = no_init_weights() if model.images else nullcontext()
    with quiet(True), one_line(str(folder)), torch.device(device), bare:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        arguments = {} if dtype is None else {"dtype": dtype}
        return factory_of(model).from_config(config, trust_remote_code=model.trust_remote_code, **arguments)


def outline_tokenizer(model: ModelConfig) -> Any | None:
    """The model's tokenizer; None if it is not on this machine."""
    folder = folder_of(model)
    if folder is None:
        return None
    with quiet(True), one_line(f"the tokenizer of {folder}"):
        return load_tokenizer(str(folder), {"trust_remote_code": model.trust_remote_code})


def folder_of(model: ModelConfig) -> Path | None:
    """The folder of the model on this machine; None if it is not here, or a GGUF file that is not converted yet."""
    if model.gguf:
        return gguf.converted(gguf.find(Path(model.gguf), f"model.gguf: {model.gguf}"))
    if model.path:
        return Path(model.path) if (Path(model.path) / "config.json").is_file() else None
    if model.bundled:
        return BUNDLED
    if model.id and (snapshot := cached(model.id, model.revision)):
        return snapshot
    file = gguf.in_package(model.package) if model.package else None
    return gguf.converted(file) if file else None
