"""The frozen model that a benchmark's methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_cli.adapter.tenants.update_class import update_class, update_name
from lowrank_cli.models.load import load
from lowrank_cli.models.shape import random_model
from lowrank_cli.runs import Run
from lowrank_cli.schema import BenchRun
from lowrank_cli.session.device import greet, prepare


@dataclass(frozen=True)
class BaseModel:
    """A loaded model, or one of random weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None  #: None for random weights
    device: torch.device
    facts: dict[str, Any]  #: its description in ``bench.json``

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)


def load_base(config: BenchRun, run: Run, generates: bool = False) -> BaseModel:
    """Load or draw (``config.seed``) the model, and print the run's first lines.

    Args:
        generates: whether tokens are generated; then the weights may be packed (``hardware.prepack``).
    """
    device = prepare(config.hardware).device
    torch.manual_seed(config.seed)
    tokenizer = None
    if config.model.shape:
        model, packing = random_model(config.model, config.hardware, device, generates)
        count = sum(parameter.numel() for parameter in model.parameters())
        header = f"random weights of shape {config.model.shape}: {count / 1e6:.0f}M-parameter Llama"
    else:
        loaded = load(config.model, config.hardware, None, generates=generates)
        model, header, tokenizer = loaded.model.to(device).eval(), loaded.header, loaded.tokenizer
        packing = loaded.packing
    model.generation_config = GenerationConfig(pad_token_id=0)
    greet(run, config.hardware, model, header, packing=packing)
    facts = {"model": header, "packing": packing, "layers": model.config.num_hidden_layers}
    if hasattr(config.bench, "tenants"):
        facts["grouped"] = update_name(update_class(config.hardware.grouped, model))
    return BaseModel(model, tokenizer, device, facts)


def autocast(config: BenchRun) -> torch.autocast:
    """Computes in bf16 on fp32 weights if ``hardware.precision`` is ``autocast``."""
    hardware = config.hardware
    return torch.autocast(hardware.device, torch.bfloat16, enabled=hardware.precision == "autocast")
