"""Model configurations and folders for tests, and models that are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from lowrank_cli.errors import UserError
from lowrank_cli.models.load import BUNDLED, Head, load
from lowrank_cli.schema import HardwareConfig, ModelConfig


def config(name="made", kind="causal", **values) -> ModelConfig:
    base = {"id": None, "path": None, "bundled": False, "revision": None, "trust_remote_code": False}
    return ModelConfig(name=name, kind=kind, **{**base, **values})


def hardware(precision="fp32") -> HardwareConfig:
    return HardwareConfig(name="cpu", device="cpu", precision=precision, processes=1, threads=1)


def random_bert(folder: Path) -> Path:
    """A masked-LM checkpoint of two layers in ``folder``: it has no pooler, so a classifier needs a new one."""
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, folder)
    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    BertForMaskedLM(settings).save_pretrained(folder)
    return folder


def refused(message: str, found: ModelConfig, head: Head | None = None) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(found, hardware(), head)
    assert "\n" not in str(error.value)
