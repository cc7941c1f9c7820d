"""``lrk bench``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, inside, require_choice, require_range
from lowrank_cli.schema.hardware import HardwareConfig
from lowrank_cli.schema.model import ModelConfig
from lowrank_cli.schema.task import TaskConfig

MEASURES = ("decode", "train")  #: what ``lrk bench`` measures: generation, or a training step
BASE = "base"  #: the entry of ``bench.methods`` that stands for the bare model
#: Entries that stand for the PEFT library's LoRA, and the package of their loss; None is the model's own.
PEFTS = {"peft": None, "peft+trl": "trl", "peft+liger": "liger_kernel"}
VLLM, VLLM_LORA = "vllm", "vllm+lora"  #: entries that stand for vLLM with the bare model, and with our LoRAs


@dataclass
class BenchConfig:
    """What a benchmark measures, and how often."""

    measure: str = MISSING  #: ``decode`` or ``train``; the first word of the command line
    methods: list[str] = (
        MISSING  #: ``base`` (the bare model), methods, and LoRAs of others (:data:`PEFTS`, vLLM), each with KEY=VALUE
    )
    rank: Optional[int] = MISSING  #: of every method that has one; null takes the methods' own
    batch_size: int = MISSING  #: prompts generated from, or examples trained on, at once
    prompt_length: int = (
        MISSING  #: random tokens of each prompt; with a task, of its longest example, as near as can be
    )
    new_tokens: int = MISSING  #: ``decode``: generated for each prompt; none stops earlier
    beams: list[int] = MISSING  #: ``decode``: 1 is greedy decoding
    #: ``decode``: different adapters in one batch, in turn over its rows: ours in a bank; for each of these numbers all
    #: is measured once more
    tenants: list[int] = MISSING
    rounds: int = MISSING  #: each runs every method once, in rotated order; one more comes first and is not counted
    #: ``decode``: the Python of an environment that has vLLM, for the entries ``vllm`` (bare) and ``vllm+lora``
    vllm: Optional[str] = None

    def validate(self) -> None:
        require_choice("bench.measure", self.measure, MEASURES)
        for key in ("batch_size", "prompt_length", "rounds"):
            require_range(f"bench.{key}", getattr(self, key), 1)
        require_range("bench.new_tokens", self.new_tokens, 2)
        if not self.beams or len(set(self.beams)) < len(self.beams):
            raise UserError(f"bench.beams: {list(self.beams)} must name each number of beams once")
        for beams in self.beams:
            require_range("bench.beams", beams, 1)
        if len(set(self.tenants)) < len(self.tenants):
            raise UserError(f"bench.tenants: {list(self.tenants)} names a number twice")
        if self.tenants and self.measure != "decode":
            raise UserError("bench.tenants: adapters share a batch in lrk bench decode only; leave it out")
        for count in self.tenants:
            require_range("bench.tenants", count, 1)
            if count > self.batch_size:
                raise UserError(
                    f"bench.tenants: {count} adapters need as many rows; set bench.batch_size={count} or more "
                    f"(it is {self.batch_size})"
                )


@dataclass
class BenchRun:
    """``lrk bench``."""

    seed: int = MISSING  #: of weights, adapters and prompts
    outputs: str = MISSING
    name: Optional[str] = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    task: Optional[TaskConfig] = None  #: ``train``: whose examples are trained on; null takes random tokens
    bench: BenchConfig = field(default_factory=BenchConfig)
    variants: dict[str, Any] = field(default_factory=dict)  #: the :class:`MethodConfig` of each of ``bench.methods``

    def validate(self) -> None:
        if self.model.kind != "causal":
            raise UserError(f"model.kind: {self.model.name} is an encoder and generates nothing; take a causal model")
        if self.hardware.processes > 1:
            raise UserError(f"hardware.processes: {self.hardware.processes}, but a benchmark runs in one process")
        if self.hardware.quantization and self.model.shape:
            raise UserError(
                f"hardware.quantization: {self.hardware.quantization} needs a checkpoint, and model.shape draws random "
                f"weights; set hardware.quantization=null, or model.shape=null and a model"
            )
        if self.task is not None:
            if self.bench.measure != "train":
                raise UserError("task: lrk bench decode generates from random tokens; leave it out")
            if self.model.shape:
                raise UserError(f"task: {self.task.name} needs a tokenizer; set model.shape=null and a model")
        if any(entry.split()[0] in (VLLM, VLLM_LORA) for entry in self.variants):
            self._validate_vllm()
        for entry, variant in self.variants.items():
            if PEFTS.get(entry.split()[0]) and self.bench.measure != "train":
                raise UserError(f"bench.methods: '{entry}' differs from peft in its loss, for lrk bench train only")
            if variant is not None:
                with inside("method", f"bench.methods: '{entry}': method"):
                    variant.validate()

    def _validate_vllm(self) -> None:
        if self.bench.measure != "decode":
            raise UserError("bench.methods: vLLM decodes and trains nothing; leave its entries out of lrk bench train")
        if list(self.bench.beams) != [1]:
            raise UserError("bench.beams: vLLM is measured without beams; set bench.beams=[1]")
