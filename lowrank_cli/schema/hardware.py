"""Device, precision and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range

#: Names of ``hardware.attention``, and what transformers calls them.
ATTENTION = {"auto": None, "sdpa": "sdpa", "flash": "flash_attention_2", "eager": "eager"}


@dataclass
class HardwareConfig:
    """Where and in which precision a run computes."""

    name: str = MISSING
    device: str = MISSING  #: ``cpu`` or ``cuda``
    precision: str = (
        MISSING  #: ``fp32``; ``bf16`` (frozen weights bf16, trained ones fp32); ``autocast`` (fp32 weights, bf16 math)
    )
    processes: int = MISSING  #: data-parallel processes of a node, one a device; several are started as by torchrun
    nodes: int = 1  #: machines that train together, see :mod:`lowrank_cli.launch.nodes`
    #: which processes hold one copy of the frozen weights together, each a share of every layer (FSDP2): those of a
    #: ``node``, or ``all``; null: each process holds them whole
    shard: Optional[str] = None
    threads: Optional[int] = (
        MISSING  #: CPU threads of each process; null: as many as the cores and the model's width allow
    )
    #: on a CPU in fp32: keep a second, packed copy of the weights, to generate and evaluate faster (not GPT-2's
    #: Conv1D), multiplied by own kernels where there are any (see ``grouped``), else by oneDNN; null: ``lrk generate``,
    #: ``serve`` and ``bench decode`` do, where it takes at most half of the memory that is free
    prepack: Optional[bool] = None
    #: what training computes again to save memory: ``none``, the ``feed_forward`` activations and norms, whole
    #: ``layers``, or ``layers_offloaded``, whose inputs wait in the CPU's memory (of a GPU); ``auto`` is feed_forward
    #: where that is gated and nothing compiles, which costs about 1 %, else none
    gradient_checkpointing: str = "auto"
    #: how attention is computed: ``sdpa`` (torch's fused kernels), ``flash`` (FlashAttention 2, on CUDA in bf16),
    #: ``eager`` (plain matrix products), or ``auto``: what transformers takes for the model, usually sdpa
    attention: str = "auto"
    compile: bool = False  #: training runs layers compiled (the first step waits for it); evaluation never does
    #: ``nf4``: frozen linears in 4 bits (by bitsandbytes, with bf16 products); null: as ``precision`` says
    quantization: Optional[str] = None
    #: how a batch of many adapters is computed: ``torch`` (batched products) or ``triton`` (own kernels, CUDA only);
    #: null: own kernels on a CPU with AVX-512, in fp32, where a C compiler is installed, else torch
    grouped: Optional[str] = None

    @property
    def world(self) -> int:
        """The number of processes on all nodes."""
        return self.nodes * self.processes

    @property
    def sharers(self) -> int:
        """The number of processes that hold one copy of the frozen weights."""
        return {"node": self.processes, "all": self.world}.get(self.shard or "", 1)

    @property
    def divided(self) -> bool:
        """Whether processes divide the frozen weights among them."""
        return self.sharers > 1

    def require_one_process(self, why: str) -> None:
        """Raise UserError, ending with ``why``, if there are several processes."""
        if self.world > 1:
            raise UserError(f"hardware.processes: {self.world}, but {why}")

    def validate(self) -> None:
        require_choice("hardware.shard", "null" if self.shard is None else self.shard, ("null", "node", "all"))
        require_choice("hardware.device", self.device, ("cpu", "cuda"))
        require_choice("hardware.precision", self.precision, ("fp32", "bf16", "autocast"))
        if self.prepack and (self.device, self.precision) != ("cpu", "fp32"):
            raise UserError(
                f"hardware.prepack: true is for hardware.device=cpu and hardware.precision=fp32, "
                f"not {self.device} and {self.precision}"
            )
        ways = ("auto", "none", "feed_forward", "layers", "layers_offloaded")
        require_choice("hardware.gradient_checkpointing", self.gradient_checkpointing, ways)
        if self.gradient_checkpointing == "layers_offloaded" and self.device == "cpu":
            raise UserError(
                "hardware.gradient_checkpointing: layers_offloaded moves the inputs of layers from a GPU to the CPU's "
                "memory, and hardware.device is cpu; take layers"
            )
        if self.compile and self.gradient_checkpointing == "feed_forward":
            raise UserError(
                "hardware.gradient_checkpointing: feed_forward is for hardware.compile=false; compiled, "
                "take auto (the compiler chooses what to compute again) or layers"
            )
        require_choice("hardware.quantization", self.quantization or "null", ("null", "nf4"))
        if self.quantization and (self.device, self.precision) != ("cuda", "bf16"):
            raise UserError(
                f"hardware.quantization: {self.quantization} is for hardware.device=cuda and hardware.precision=bf16, "
                f"not {self.device} and {self.precision}"
            )
        if self.quantization and self.compile:
            raise UserError(
                f"hardware.compile: true is for hardware.quantization=null, as linears in 4 bits ({self.quantization}) "
                f"do not compile; set hardware.compile=false"
            )
        require_choice("hardware.attention", self.attention, ATTENTION)
        if self.attention == "flash" and (self.device != "cuda" or self.precision == "fp32"):
            raise UserError(
                f"hardware.attention: flash is for hardware.device=cuda and hardware.precision=bf16 or autocast, "
                f"not {self.device} and {self.precision}"
            )
        require_choice("hardware.grouped", self.grouped or "null", ("null", "torch", "triton"))
        if self.grouped == "triton" and self.device != "cuda":
            raise UserError(f"hardware.grouped: triton is for hardware.device=cuda, not {self.device}; set torch")
        require_range("hardware.processes", self.processes, 1)
        require_range("hardware.nodes", self.nodes, 1)
        if self.divided and self.quantization:
            raise UserError(
                f"hardware.shard: {self.shard} divides weights in bf16 or fp32, and hardware.quantization="
                f"{self.quantization} keeps them in 4 bits; set hardware.quantization=null"
            )
        if self.divided and self.prepack:
            raise UserError(
                f"hardware.prepack: true copies whole weights, and hardware.shard={self.shard} divides them"
            )
        if self.threads is not None:
            require_range("hardware.threads", self.threads, 1)
