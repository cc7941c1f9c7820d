"""``lrk import``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError
from lowrank_cli.schema.run import RunConfig


@dataclass
class ImportRun(RunConfig):
    """``lrk import``."""

    #: folder or Hub repository of an adapter of the PEFT library; on the command line the word that is no KEY=VALUE
    adapter: Optional[str] = MISSING
    revision: Optional[str] = MISSING  #: branch, tag or commit of the Hub repository; null is its main branch

    def validate(self) -> None:
        if self.adapter is None:
            raise UserError("import: name an adapter of the PEFT library: lrk import FOLDER, or lrk import ORG/NAME")
        if self.model.kind != "causal":
            raise UserError(
                f"model.kind: {self.model.name} is an encoder, whose adapters come with a head; take a causal model"
            )
        self.hardware.require_one_process("one process imports")
