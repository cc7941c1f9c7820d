"""``lrk export``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range
from lowrank_cli.schema.run import RunConfig


@dataclass
class ExportConfig:
    """What is written for other programs."""

    #: ``lora`` (a PEFT adapter), ``merged`` (the whole model with the updates in its weights), or for llama.cpp
    #: ``gguf`` (a LoRA) or ``gguf_merged`` (the whole model)
    format: str = MISSING
    #: what will load a LoRA: ``peft``, ``vllm`` or ``sglang``; what that engine cannot take is refused
    target: str = "peft"
    rank: Optional[int] = MISSING  #: of a LoRA's modules at most: the rest is cut off; null keeps all of the change
    #: largest difference of logits, relative to the largest logit, that is not refused; null is 0.001, of bf16 0.05
    max_error: Optional[float] = MISSING

    def validate(self) -> None:
        require_choice("export.format", self.format, ("lora", "merged", "gguf", "gguf_merged"))
        require_choice("export.target", self.target, ("peft", "vllm", "sglang"))
        if self.target != "peft" and self.format != "lora":
            raise UserError(
                f"export.target: {self.target} loads a LoRA of PEFT, and export.format={self.format} is not one; "
                f"leave it out, or set export.format=lora"
            )
        if self.rank is not None:
            require_range("export.rank", self.rank, 1)
            if self.whole:
                raise UserError(
                    "export.rank: merged weights hold the whole change; leave it out, or export.format=lora"
                )
        if self.max_error is not None:
            require_range("export.max_error", self.max_error, 0)

    @property
    def whole(self) -> bool:
        """Whether the whole model is written, with the updates in its weights."""
        return self.format in ("merged", "gguf_merged")


@dataclass
class ExportRun(RunConfig):
    """``lrk export``."""

    export: ExportConfig = field(default_factory=ExportConfig)
    run: Optional[str] = MISSING  #: as of ``lrk evaluate``

    def validate(self) -> None:
        self.hardware.require_one_process("one process exports; set it to 1")
