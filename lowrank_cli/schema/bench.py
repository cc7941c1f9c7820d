"""``lrk bench``: one schema for each kind of measurement; ``conf/bench/*.yaml`` holds their values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, inside, require_choice, require_range
from lowrank_cli.schema.hardware import HardwareConfig
from lowrank_cli.schema.model import ModelConfig
from lowrank_cli.schema.task import TaskConfig

BASE = "base"  #: the entry of ``bench.methods`` that stands for the bare model
#: Entries that stand for the PEFT library's LoRA, and the package of their loss; None is the model's own.
PEFTS = {"peft": None, "peft+trl": "trl", "peft+liger": "liger_kernel"}
VLLM, VLLM_LORA = "vllm", "vllm+lora"  #: entries that stand for vLLM with the bare model, and with our LoRAs


@dataclass
class BenchConfig:
    """What every kind of benchmark has."""

    others: ClassVar[tuple[str, ...]] = ()  #: entries of ``methods`` that are no methods of ours
    task: ClassVar[str] = ""  #: whether a ``task`` is ``required``, ``optional`` or, by default, refused

    measure: str = MISSING  #: the kind of measurement, which decides the other keys; ``lrk bench NAME`` chooses a file
    #: methods, each with KEY=VALUE where it differs from its file; ``base`` (the bare model), ``peft``, ``vllm``
    methods: list[str] = MISSING
    rank: Optional[int] = MISSING  #: of every method that has one; null takes the methods' own
    rounds: int = MISSING  #: each measures everything once, in rotated order; one more comes first and is not counted

    def validate(self) -> None:
        require_choice("bench.measure", self.measure, BENCHES)
        if type(self) is not BENCHES[self.measure]:
            raise UserError(f"bench.measure: '{self.measure}' has other keys; choose it with: lrk bench {self.measure}")
        require_range("bench.rounds", self.rounds, 1)

    def require_positive(self, *keys: str) -> None:
        """Raise UserError for a key below 1."""
        for key in keys:
            require_range(f"bench.{key}", getattr(self, key), 1)


@dataclass
class DecodeBench(BenchConfig):
    """Generation with adapters that are not merged, alone or many of them in a batch."""

    others: ClassVar[tuple[str, ...]] = (BASE, "peft", VLLM, VLLM_LORA)

    batch_size: int = MISSING  #: prompts generated from at once
    prompt_length: int = MISSING  #: random tokens of each prompt
    new_tokens: int = MISSING  #: generated for each prompt; none stops earlier
    beams: list[int] = MISSING  #: 1 is greedy decoding
    #: numbers of different adapters in one batch, which take turns over its rows; each is measured in addition
    tenants: list[int] = MISSING
    vllm: Optional[str] = (
        None  #: the Python of an environment that has vLLM, for the entries ``vllm`` and ``vllm+lora``
    )

    def validate(self) -> None:
        super().validate()
        self.require_positive("batch_size", "prompt_length")
        require_range("bench.new_tokens", self.new_tokens, 2)
        if not self.beams or len(set(self.beams)) < len(self.beams):
            raise UserError(f"bench.beams: {list(self.beams)} must name each number of beams once")
        for beams in self.beams:
            require_range("bench.beams", beams, 1)
        if len(set(self.tenants)) < len(self.tenants):
            raise UserError(f"bench.tenants: {list(self.tenants)} names a number twice")
        for count in self.tenants:
            require_range("bench.tenants", count, 1)
            if count > self.batch_size:
                raise UserError(
                    f"bench.tenants: {count} adapters need as many rows; set bench.batch_size={count} or more "
                    f"(it is {self.batch_size})"
                )
        if any(entry.split()[0] in (VLLM, VLLM_LORA) for entry in self.methods) and list(self.beams) != [1]:
            raise UserError("bench.beams: vLLM is measured without beams; set bench.beams=[1]")


@dataclass
class TrainBench(BenchConfig):
    """A forward and a backward pass."""

    others: ClassVar[tuple[str, ...]] = (BASE, *PEFTS)
    task: ClassVar[str] = "optional"

    batch_size: int = MISSING  #: examples trained on at once
    prompt_length: int = MISSING  #: random tokens of a row; with a task, of its longest example, as near as can be

    def validate(self) -> None:
        super().validate()
        self.require_positive("batch_size", "prompt_length")


@dataclass
class LoopBench(TrainBench):
    """Whole training steps, the optimizer and what a method does between steps included."""

    others: ClassVar[tuple[str, ...]] = ()

    steps: int = MISSING  #: of each method in a round
    total_steps: int = (
        MISSING  #: of the training that these are the first steps of, by which methods schedule their work
    )

    def validate(self) -> None:
        super().validate()
        self.require_positive("steps")
        if self.total_steps < (self.rounds + 1) * self.steps:
            raise UserError(
                f"bench.total_steps: {self.total_steps} is below the {(self.rounds + 1) * self.steps} steps of all "
                f"rounds (bench.steps × (bench.rounds + 1))"
            )


@dataclass
class ScoreBench(TrainBench):
    """Scores of all ranks of an adapter: exact ones, one at a time and together, and approximations."""

    others: ClassVar[tuple[str, ...]] = ()

    tokens: int = MISSING  #: of one forward pass, at most
    sample: int = MISSING  #: ranks that are scored one at a time; their mean time stands for all

    def validate(self) -> None:
        super().validate()
        self.require_positive("tokens", "sample")


@dataclass
class InContextBench(BenchConfig):
    """Queries with demonstrations: the shared KV cache against whole prompts, and methods that calibrate answers."""

    others: ClassVar[tuple[str, ...]] = (BASE,)
    task: ClassVar[str] = "required"

    shots: int = MISSING  #: demonstrations in front of each query
    queries: int = MISSING  #: test examples, at most
    batch_size: int = MISSING  #: queries of one batch

    def validate(self) -> None:
        super().validate()
        self.require_positive("shots", "queries", "batch_size")


@dataclass
class LoadBench(BenchConfig):
    """One more adapter loaded into a model that serves others."""

    others: ClassVar[tuple[str, ...]] = ("peft",)


@dataclass
class PrepackBench(BenchConfig):
    """A decoding step with the frozen weights packed for the CPU (``hardware.prepack``), and with them as they are."""

    others: ClassVar[tuple[str, ...]] = (BASE,)

    tenants: int = MISSING  #: rows of the batch, each with an adapter of its own
    prompt_length: int = MISSING  #: random tokens of each prompt
    new_tokens: int = MISSING  #: decoding steps of a round

    def validate(self) -> None:
        super().validate()
        self.require_positive("tenants", "prompt_length", "new_tokens")


@dataclass
class ServeBench(BenchConfig):
    """``lrk serve`` under load, for many adapters; see :mod:`lowrank_cli.bench.serve`."""

    others: ClassVar[tuple[str, ...]] = (BASE, VLLM, VLLM_LORA)

    tenants: list[int] = MISSING  #: numbers of different adapters, which requests ask in turn
    rates: list[float] = MISSING  #: requests per second, arriving at random (Poisson); ``inf`` sends all at once
    requests: int = MISSING  #: of each method in a round
    prompt_length: int = MISSING  #: random tokens of each prompt
    new_tokens: int = MISSING  #: generated for each; none stops earlier
    max_rows: int = MISSING  #: answers that a server generates at a time
    vllm: Optional[str] = None  #: as of ``lrk bench decode``

    def validate(self) -> None:
        super().validate()
        self.require_positive("requests", "prompt_length", "max_rows")
        require_range("bench.new_tokens", self.new_tokens, 2)
        for key, low in (("tenants", 1), ("rates", 0.001)):
            values = list(getattr(self, key))
            if not values or len(set(values)) < len(values):
                raise UserError(f"bench.{key}: {values} must name each number once")
            for value in values:
                if value != float("inf") or key == "tenants":
                    require_range(f"bench.{key}", value, low)


#: Kinds of measurement: each has a module of the same name in ``lowrank_cli/bench``.
BENCHES: dict[str, type[BenchConfig]] = {
    "decode": DecodeBench,
    "train": TrainBench,
    "loop": LoopBench,
    "score": ScoreBench,
    "icl": InContextBench,
    "load": LoadBench,
    "prepack": PrepackBench,
    "serve": ServeBench,
}


@dataclass
class BenchRun:
    """``lrk bench``."""

    seed: int = MISSING  #: of weights, adapters and prompts
    outputs: str = MISSING
    name: Optional[str] = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    task: Optional[TaskConfig] = None  #: whose examples are taken; null takes random tokens
    bench: BenchConfig = field(default_factory=BenchConfig)
    variants: dict[str, Any] = field(default_factory=dict)  #: the :class:`MethodConfig` of each of ``bench.methods``

    def validate(self) -> None:
        if self.model.kind != "causal":
            raise UserError(f"model.kind: {self.model.name} is an encoder and generates nothing; take a causal model")
        self.hardware.require_one_process("a benchmark runs in one process")
        if self.hardware.quantization and self.model.shape:
            raise UserError(
                f"hardware.quantization: {self.hardware.quantization} needs a checkpoint, and model.shape draws random "
                f"weights; set hardware.quantization=null, or model.shape=null and a model"
            )
        self._validate_task()
        if self.bench.measure == "prepack" and (self.hardware.device != "cpu" or self.hardware.prepack is not None):
            raise UserError("hardware: lrk bench prepack packs weights itself, on a CPU; leave hardware.prepack null")
        for entry, variant in self.variants.items():
            if variant is not None:
                with inside("method", f"bench.methods: '{entry}': method"):
                    variant.validate()

    def _validate_task(self) -> None:
        if self.task is None:
            if self.bench.task == "required":
                raise UserError(f"task: missing; lrk bench {self.bench.measure} asks its examples (task=NAME)")
            return
        if not self.bench.task:
            raise UserError(f"task: lrk bench {self.bench.measure} takes random tokens; leave it out")
        if self.model.shape:
            raise UserError(f"task: {self.task.name} needs a tokenizer; set model.shape=null and a model")
