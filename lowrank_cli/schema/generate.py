"""``lrk generate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_range
from lowrank_cli.schema.run import RunConfig


@dataclass
class GenerateConfig:
    """What is continued, and how."""

    prompt: Optional[str] = MISSING  #: one prompt, as it stands; on the command line the word that is no KEY=VALUE
    #: a file of JSON lines {"tenant": folder of a run or an adapter (null: the bare model), "prompt": text}, instead
    tenants: Optional[str] = MISSING
    output: Optional[str] = MISSING  #: file to write the answers to, as JSON lines; null prints them
    max_new_tokens: int = MISSING  #: longest answer, in tokens
    num_beams: int = MISSING  #: 1 writes token by token
    temperature: float = MISSING  #: 0 takes the most probable token (or beam); above it, tokens are drawn
    batch_size: int = MISSING  #: prompts of one batch
    max_bytes: Optional[int] = MISSING  #: memory of all adapters on the device; those not in use wait in the host's

    def validate(self) -> None:
        if (self.prompt is None) == (self.tenants is None):
            raise UserError('generate: give one prompt ("…"), or a file of them (--tenants FILE)')
        require_range("generate.temperature", self.temperature, 0)
        for key in ("max_new_tokens", "num_beams", "batch_size"):
            require_range(f"generate.{key}", getattr(self, key), 1)
        if self.max_bytes is not None:
            require_range("generate.max_bytes", self.max_bytes, 1)


@dataclass
class GenerateRun(RunConfig):
    """``lrk generate``."""

    generate: GenerateConfig = field(default_factory=GenerateConfig)
    run: Optional[str] = MISSING  #: folder of the run whose adapter answers ``prompt``, and whose model is taken

    def validate(self) -> None:
        if self.model.kind != "causal":
            raise UserError(f"model.kind: {self.model.name} is an encoder and generates nothing; take a causal model")
        self.hardware.require_one_process("answers are written by one process")
