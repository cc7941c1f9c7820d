"""``lrk serve``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_range
from lowrank_cli.schema.run import RunConfig

LOOPBACK = ("127.0.0.1", "::1", "localhost")  #: hosts that only this machine reaches


@dataclass
class ServeConfig:
    """What is served, to whom, and how much at a time."""

    #: a file of JSON lines {"name": NAME, "tenant": folder of a run or an adapter}; null serves the adapter of run=
    tenants: Optional[str] = MISSING
    name: Optional[str] = MISSING  #: what requests call the adapter of run=; null is the name of its folder
    host: str = MISSING  #: address to listen on; one that other machines reach needs ``token_file``
    port: int = MISSING  #: 0 takes a free one
    token_file: Optional[str] = MISSING  #: file with the token that requests have to bear; null asks for none
    adapters: Optional[str] = MISSING  #: folder from which requests may load adapters; null allows none
    #: file with a Jinja template for models that were not trained in one of their own; null is the tokenizer's
    chat_template: Optional[str] = MISSING
    max_rows: int = MISSING  #: answers generated at a time
    max_waiting: int = MISSING  #: answers that may wait for that; more requests are refused (429)
    max_length: Optional[int] = MISSING  #: tokens of a prompt and its answer; null is what the model can
    max_body_bytes: int = MISSING  #: largest body of a request
    max_bytes: Optional[int] = MISSING  #: memory of the low-rank adapters on the device; others wait in the host's
    grace: float = MISSING  #: seconds that running requests get after the signal to stop

    def validate(self) -> None:
        require_range("serve.port", self.port, 0, 65535)
        for key in ("max_rows", "max_waiting", "max_length", "max_body_bytes", "max_bytes"):
            if getattr(self, key) is not None:
                require_range(f"serve.{key}", getattr(self, key), 1)
        require_range("serve.grace", self.grace, 0)
        if self.host not in LOOPBACK and self.token_file is None:
            raise UserError(
                f"serve.host: {self.host} can be reached by other machines; set serve.token_file=FILE, or "
                f"serve.host={LOOPBACK[0]}"
            )


@dataclass
class ServeRun(RunConfig):
    """``lrk serve``."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    run: Optional[str] = MISSING  #: folder of the run whose adapter and model are served; with ``tenants``, its model

    def validate(self) -> None:
        if self.model.kind != "causal":
            raise UserError(f"model.kind: {self.model.name} is an encoder and generates nothing; take a causal model")
        self.hardware.require_one_process("one process serves")
