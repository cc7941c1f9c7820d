"""Typed schemas of the config groups. Meaning stands here, values stand in ``conf/``; nothing heavy is imported.

A method's own schema stands in its file under ``lowrank_cli/methods`` and derives from :class:`MethodConfig`.
``validate`` checks what a type cannot say; it raises :class:`lowrank_cli.errors.UserError`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, inside, nearest, require_choice, require_range

#: What a rank can be scored by, with what the number is; see :mod:`lowrank_cli.scoring.kinds`.
SCORE_KINDS = {
    "ab": "dev loss (nats) without the rank minus with all, plus that of the bare model minus with the rank alone",
    "mixed": "dev loss (nats) that the rank saves, exact as ab near the cut, and beyond estimated as taylor's",
    "taylor": "dev loss (nats) that the rank saves, as ab but estimated from gradients",
    "sensitivity": "|weight × gradient| times how much that varies (nats²), both smoothed over parts of the dev batch",
    "dnas": "how far a trained gate of the rank opened (above 0) or closed (below)",
    "magnitude": "norm of what the rank adds to its weight",
}
#: What a whole module can be scored by, likewise; see :mod:`lowrank_cli.scoring.modules`.
MODULE_KINDS = {
    "ablation": "dev loss (nats) without the module minus with all, plus that of the bare model minus with it alone",
    "mixed": "dev loss (nats) that the module saves, exact as ablation near the cut, and beyond estimated as taylor's",
    "kl": "divergence (nats) of the answers without the module from those with all",
    "taylor": "dev loss (nats) that the module saves, as ablation but estimated from gradients",
    "magnitude": "norm of the module's update relative to that of the frozen output",
    "random": "numbers drawn by the seed",
}
#: Kinds by ``score.level``, each with its default first.
KINDS = {"rank": SCORE_KINDS, "module": MODULE_KINDS}
#: As a kind: the best of the exact one, ``mixed`` and ``taylor`` that costs less than a tenth of training; see
#: :mod:`lowrank_cli.scoring.cost`.
AUTO = "auto"

#: Sizes of Llama models: layers, width, feed-forward width, heads, key-value heads, vocabulary.
SHAPES = {
    "100m": (12, 768, 2048, 12, 12, 32000),
    "1b": (16, 2048, 8192, 32, 8, 128256),  # Llama 3.2
    "7b": (32, 4096, 11008, 32, 32, 32000),  # Llama 2
    "8b": (32, 4096, 14336, 32, 8, 128256),  # Llama 3
    "13b": (40, 5120, 13824, 40, 40, 32000),  # Llama 2
}


@dataclass
class MethodConfig:
    """What every method has."""

    name: str = MISSING  #: the method's registered name
    made_with: ClassVar[tuple[str, ...]] = ()  #: keys whose values what a run keeps depends on

    def validate(self) -> None:
        """Check ranges that need no model."""

    def unfit(self, made: Mapping[str, Any]) -> list[str]:
        """Keys whose values do not go with what a run of this method with the values ``made`` keeps."""
        return [key for key in self.made_with if key in made and getattr(self, key) != made[key]]

    def absorb(self, given: Collection[str]) -> dict[str, Any]:
        """Values from files that this section names: they become part of it, so that what is saved is what ran.

        ``given`` are the keys that the user set.
        """
        return {}


TRUST = "model.trust_remote_code"  #: the key that no file can set, only what is typed


@dataclass
class ModelConfig:
    """Which pretrained model, and where it lies."""

    name: str = MISSING  #: short name, used in run folders and tables; ``???``: that of ``id``, ``path`` or ``gguf``
    kind: str = MISSING  #: ``causal`` (LM head) or ``encoder`` (linear head on the first token or the pooler)
    id: Optional[str] = MISSING  #: repository on the Hub; null when only a folder can be given
    path: Optional[str] = MISSING  #: a local folder, instead of the Hub; relative to the caller's directory
    bundled: bool = MISSING  #: the checkpoint inside this package (``path`` overrides it)
    revision: Optional[str] = MISSING  #: branch, tag or commit on the Hub
    trust_remote_code: bool = MISSING  #: run Python code that comes with the checkpoint
    #: a GGUF file, or a folder with one, instead of the Hub: converted once, see :mod:`lowrank_cli.models.gguf`
    gguf: Optional[str] = None
    #: an installed Python package that holds the model as GGUF, used where the Hub cannot be reached
    package: Optional[str] = None
    #: random weights instead: a name of :data:`SHAPES`, or LAYERSxWIDTHxFEEDFORWARDxHEADS (``lrk bench`` only)
    shape: Optional[str] = None

    def validate(self) -> None:
        require_choice("model.kind", self.kind, ("causal", "encoder"))
        if self.shape is not None:
            self.sizes()
        if not (self.bundled or self.id or self.path or self.gguf):
            raise UserError("model: nothing to load; set model.id (Hub), model.path (folder) or model.gguf (file)")
        if self.gguf and self.path:
            raise UserError(f"model.gguf: {self.gguf} and model.path={self.path} both name the weights; give one")
        if self.package is not None and not self.package.isidentifier():  # a dotted name would import what is before it
            raise UserError(f"model.package: '{self.package}' is not the name of a Python package")
        if self.gguf and self.kind == "encoder":
            raise UserError("model.gguf: holds causal models; set model.kind=causal, or name an encoder by model.path")

    def sizes(self) -> tuple[int, ...]:
        """What ``shape`` stands for, as a row of :data:`SHAPES`."""
        assert self.shape is not None
        if self.shape in SHAPES:
            return SHAPES[self.shape]
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", self.shape):
            raise UserError(
                f"model.shape: unknown value '{self.shape}'{nearest(self.shape, SHAPES)} "
                f"(allowed: {', '.join(SHAPES)}, or LAYERSxWIDTHxFEEDFORWARDxHEADS, such as 12x768x2048x12)"
            )
        layers, width, feed_forward, heads = map(int, self.shape.split("x"))
        if width % (2 * heads):
            raise UserError(f"model.shape: a width of {width} does not divide into {heads} heads of even size")
        return layers, width, feed_forward, heads, heads, 32000


@dataclass
class TaskConfig:
    """One data set with its prompt, its answers, its splits and its metric.

    ``answer`` is ``labels`` (one fixed set of ``label_words``), ``choices`` (each row lists its own, answered by
    letter), ``free`` (generated text) or ``mix`` (several tasks trained together, each with its own answers).
    """

    name: str = MISSING
    answer: str = MISSING  #: ``labels``, ``choices``, ``free`` or ``mix``
    template: str = MISSING  #: prompt with ``{column}`` fields; ``{options}`` lists the choices, one a line
    text: list[str] = MISSING  #: one or two columns an encoder reads (text, text pair)
    target: str = MISSING  #: the column that holds the label, the index of the choice, or the free answer
    label_words: list[str] = MISSING  #: one word for each label, in label order (``labels`` only)
    label_values: list[str] = (
        MISSING  #: the column's own values in label order; empty: 0, 1, …, false/true or the words
    )
    metric: str = MISSING  #: ``accuracy``, ``exact_match``, ``number_match``, ``bleu``, ``rouge_l``; ``mean`` of a mix
    extract: Optional[str] = MISSING  #: regular expression; the last match in a free answer is what counts
    max_length: int = MISSING  #: tokens of prompt and answer together; longer prompts lose their beginning
    max_new_tokens: int = MISSING  #: longest generated answer, in tokens
    hub: Optional[str] = MISSING  #: data set on the Hub
    subset: Optional[str] = MISSING  #: configuration name on the Hub
    path: Optional[str] = MISSING  #: folder of ``<split>.jsonl`` files, instead of the Hub
    generator: Optional[str] = MISSING  #: a generator of :mod:`lowrank_cli.tasks.tiny`, instead of both
    #: ``paper`` (the papers' rule, see :mod:`lowrank_cli.tasks.splits`), ``given``, or ``held_out`` of the train split
    splits: str = MISSING
    train_split: str = MISSING  #: names of the given splits
    dev_split: str = MISSING  #: likewise
    test_split: str = MISSING  #: likewise
    limit: Optional[int] = MISSING  #: keep at most this many examples of each split
    parts: dict[str, TaskConfig] = field(default_factory=dict)  #: tasks of a ``mix``, by name; its lengths bound theirs
    templates: list[str] = field(default_factory=list)  #: other wordings of ``template``, for methods that compare them
    #: ``free`` only: rows with an empty answer are left out, and an answer too long for ``max_length`` loses its end,
    #: instead of being refused
    lenient: bool = False

    def validate(self) -> None:
        require_choice("task.answer", self.answer, ("labels", "choices", "free", "mix"))
        if (self.answer == "mix") != bool(self.parts):
            raise UserError("task.parts: task.answer=mix names its tasks there, another answer has none")
        for name, part in self.parts.items():
            if part.parts:
                raise UserError(f"task.parts: '{part.name}' is a mix itself; name its parts instead")
            with inside("task", f"task.parts.{name}"):
                part.validate()
        require_choice("task.splits", self.splits, ("paper", "given", "held_out"))
        metrics = ("mean",) if self.answer == "mix" else ("accuracy", "exact_match", "number_match", "bleu", "rouge_l")
        require_choice("task.metric", self.metric, metrics)
        require_range("task.max_length", self.max_length, 2)
        require_range("task.max_new_tokens", self.max_new_tokens, 1)
        if self.limit is not None:
            require_range("task.limit", self.limit, 1)
        if self.parts:
            self._refuse_what_parts_have()
        if self.lenient and self.answer != "free":
            raise UserError(f"task.lenient: true is for task.answer=free, not {self.answer}")
        if self.answer == "labels" and len(self.label_words) < 2:
            raise UserError(f"task.label_words: {list(self.label_words)} names fewer than two labels")
        for key in ("label_words", "label_values"):
            words = [word.casefold() for word in getattr(self, key)]
            if len(set(words)) < len(words):
                raise UserError(f"task.{key}: {list(getattr(self, key))} names a label twice")
            if not all(word.strip() for word in words):
                raise UserError(f"task.{key}: {list(getattr(self, key))} holds an empty word")
        for key, template in [("template", self.template), *(("templates", other) for other in self.templates)]:
            if self.answer != "mix" and not re.search(r"\{(?!options\})", template):
                raise UserError(f"task.{key}: {template!r} names no {{column}}, so every prompt would be the same")
        if self.label_values and len(self.label_values) != len(self.label_words):
            raise UserError("task.label_values: must be as many as task.label_words, or empty")

    def _refuse_what_parts_have(self) -> None:
        """Prompts, answers and data of a mix are those of its parts; of its own it has a name, lengths and a limit."""
        own = ("name", "max_length", "max_new_tokens", "limit", "parts")
        for key, value in vars(mix()).items():
            if key not in own and getattr(self, key) != value:
                raise UserError(f"task.{key}: a mix has none of its own; set task.parts.NAME.{key} of its tasks")


def mix() -> TaskConfig:
    """What the YAML of a mix starts from: nothing of its own but its parts, its name and its lengths."""
    return TaskConfig(
        answer="mix",
        template="",
        text=[],
        target="",
        label_words=[],
        label_values=[],
        metric="mean",
        extract=None,
        hub=None,
        subset=None,
        path=None,
        generator=None,
        splits="given",
        train_split="",
        dev_split="",
        test_split="",
        limit=None,
    )


@dataclass
class HardwareConfig:
    """Where and in which precision a run computes."""

    name: str = MISSING
    device: str = MISSING  #: ``cpu`` or ``cuda``
    precision: str = (
        MISSING  #: ``fp32``; ``bf16`` (frozen weights bf16, trained ones fp32); ``autocast`` (fp32 weights, bf16 math)
    )
    processes: int = MISSING  #: data-parallel processes, one a device; above 1 they are started by torchrun
    threads: Optional[int] = (
        MISSING  #: CPU threads of each process; null: as many as the cores and the model's width allow
    )
    #: on a CPU in fp32: keep a second, packed copy of the weights, to generate and evaluate faster (not GPT-2's
    #: Conv1D); null: ``lrk generate`` and ``bench decode`` do, where it takes at most half of the memory that is free
    prepack: Optional[bool] = None
    #: what training computes again to save memory: ``none``, the ``feed_forward`` activations and norms, or whole
    #: ``layers``; ``auto`` is feed_forward where that is gated and nothing compiles, which costs about 1 %, else none
    gradient_checkpointing: str = "auto"
    compile: bool = False  #: training runs layers compiled (the first step waits for it); evaluation never does
    #: ``nf4``: frozen linears in 4 bits (by bitsandbytes, with bf16 products); null: as ``precision`` says
    quantization: Optional[str] = None
    #: how a batch of many adapters is computed: ``torch`` (batched products) or ``triton`` (own kernels, CUDA only)
    grouped: str = "torch"

    def validate(self) -> None:
        require_choice("hardware.device", self.device, ("cpu", "cuda"))
        require_choice("hardware.precision", self.precision, ("fp32", "bf16", "autocast"))
        if self.prepack and (self.device, self.precision) != ("cpu", "fp32"):
            raise UserError(
                f"hardware.prepack: true is for hardware.device=cpu and hardware.precision=fp32, "
                f"not {self.device} and {self.precision}"
            )
        ways = ("auto", "none", "feed_forward", "layers")
        require_choice("hardware.gradient_checkpointing", self.gradient_checkpointing, ways)
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
        require_choice("hardware.grouped", self.grouped, ("torch", "triton"))
        if self.grouped == "triton" and self.device != "cuda":
            raise UserError(f"hardware.grouped: triton is for hardware.device=cuda, not {self.device}; set torch")
        require_range("hardware.processes", self.processes, 1)
        if self.threads is not None:
            require_range("hardware.threads", self.threads, 1)


@dataclass
class TrainConfig:
    """AdamW with linear warm-up and decay, dev evaluation and early stop. A step is one optimizer update."""

    learning_rate: float = MISSING  #: peak, reached after the warm-up
    weight_decay: float = MISSING  #: AdamW's
    warmup: float = MISSING  #: share of all steps
    epochs: float = MISSING  #: passes over the training set
    max_steps: Optional[int] = MISSING  #: bound on steps; replaces ``epochs`` in the schedule where smaller
    batch_size: int = MISSING  #: examples of one step, over all processes and accumulated batches
    gradient_accumulation: int = MISSING  #: batches summed into one step; times processes it divides ``batch_size``
    max_grad_norm: float = MISSING  #: gradients are clipped to this norm; 0 turns clipping off
    eval_every: int = MISSING  #: steps between dev evaluations
    patience: int = MISSING  #: evaluations without a better dev loss before training stops; 0 never stops
    log_every: int = MISSING  #: steps between lines of history.jsonl
    checkpoint_every: int = MISSING  #: steps between checkpoints to resume from; 0 keeps only that of an interrupt

    def validate(self) -> None:
        require_range("train.learning_rate", self.learning_rate, 0)
        require_range("train.weight_decay", self.weight_decay, 0)
        require_range("train.warmup", self.warmup, 0, 1)
        if not self.epochs > 0:
            raise UserError(f"train.epochs: {self.epochs} is out of range (allowed: above 0)")
        for key in ("batch_size", "gradient_accumulation", "eval_every", "log_every"):
            require_range(f"train.{key}", getattr(self, key), 1)
        for key in ("max_grad_norm", "patience", "checkpoint_every"):
            require_range(f"train.{key}", getattr(self, key), 0)
        if self.max_steps is not None:
            require_range("train.max_steps", self.max_steps, 1)


@dataclass
class PredictConfig:
    """How answers are predicted."""

    batch_size: int = MISSING  #: prompts of one batch
    num_beams: int = MISSING  #: 1 is greedy decoding
    shots: int = MISSING  #: demonstrations from the training set in front of each prompt

    def validate(self) -> None:
        require_range("evaluate.batch_size", self.batch_size, 1)
        require_range("evaluate.num_beams", self.num_beams, 1)
        require_range("evaluate.shots", self.shots, 0)


@dataclass
class EvaluateConfig(PredictConfig):
    """What an evaluation of its own measures; training ends with both splits."""

    split: str = MISSING  #: ``dev`` or ``test``

    def validate(self) -> None:
        super().validate()
        require_choice("evaluate.split", self.split, ("dev", "test"))


def require_window(key: str, share: float) -> None:
    """Raise UserError unless ``share`` of the units can be scored exactly by ``mixed``."""
    if not 0 < share <= 1:
        raise UserError(f"{key}: {share} is out of range (allowed: above 0 to 1)")


@dataclass
class ScoreConfig:
    """How ranks or whole modules are scored, on dev examples."""

    level: Optional[str] = MISSING  #: ``rank`` or ``module``; null leaves it to what ``prune`` takes out
    #: by what they are scored: a kind of that level; null is its first; ``auto`` is the best of the exact one,
    #: ``mixed`` and ``taylor`` that costs less than a tenth of the training that made the adapter
    kind: Optional[str] = MISSING
    batch: int = MISSING  #: dev examples, drawn by the seed; all of them where there are fewer
    #: of one forward pass, at most: bounds memory; about 1024 suits the caches of a CPU, a GPU is faster with more
    tokens: int = MISSING
    #: of ``mixed``: share of the ranks or modules that are scored exactly, of a layer's where layers are treated alike,
    #: half of them on each side of the cut and two at least; above 0 to 1
    window: float = 0.1

    def validate(self) -> None:
        if self.level is not None:
            require_choice("score.level", self.level, KINDS)
        if self.kind is not None:
            require_choice("score.kind", self.kind, dict.fromkeys([*chain(*KINDS.values()), AUTO]))
        require_range("score.batch", self.batch, 1)
        require_range("score.tokens", self.tokens, 1)
        require_window("score.window", self.window)

    def kind_of(self, level: str) -> str:
        """The kind of score that ``level`` gets, or :data:`AUTO`. Raises UserError for a kind of the other level."""
        kind = self.kind or next(iter(KINDS[level]))
        if kind not in (*KINDS[level], AUTO):
            other = next(name for name in KINDS if name != level)
            raise UserError(
                f"score.kind: '{kind}' scores {other}s (allowed for {level}s: {', '.join([*KINDS[level], AUTO])}; "
                f"score.level={other} scores {other}s)"
            )
        return kind


@dataclass
class PruneConfig:
    """Which of the lowest go: ranks (one of ``drop`` and ``budget``), or whole modules (``keep``, ``keep_total``)."""

    drop: Optional[int] = MISSING  #: ranks to take out
    budget: Optional[int] = MISSING  #: ranks to keep, over the whole model
    #: layers are treated alike, instead of the model as one: as many ranks go from each; ``keep`` modules stay in each,
    #: and ``keep_total`` leaves none empty. null is false for ranks and true for modules
    per_layer: Optional[bool] = MISSING
    keep: Optional[int] = None  #: modules to keep of each layer; without ``per_layer`` as many times the layers
    keep_total: Optional[int] = None  #: modules to keep, over the whole model
    same_roles: bool = False  #: the same roles in every layer: those with the highest sums

    @property
    def modules(self) -> bool:
        """Whether whole modules go, and what is left is a setting."""
        return self.keep is not None or self.keep_total is not None

    def validate(self) -> None:
        amounts = ("drop", "budget", "keep", "keep_total")
        given = [key for key in amounts if getattr(self, key) is not None]
        if len(given) > 1:
            asked = " and ".join(f"prune.{key}={getattr(self, key)}" for key in given)
            raise UserError(f"prune: {asked} are given, and only one can be (prune.{given[0]}=null takes one back)")
        if not given:
            raise UserError(
                "prune: give one of prune.drop=N (ranks to take out), prune.budget=N (ranks to keep), "
                "prune.keep=N (modules to keep of each layer) and prune.keep_total=N (modules to keep in all)"
            )
        require_range(f"prune.{given[0]}", getattr(self, given[0]), 1)
        if self.keep is not None and self.per_layer is not False:
            require_range("prune.keep", self.keep, 1, 6)  # of Q K V O G U D
        if self.same_roles and self.keep is None:
            raise UserError("prune.same_roles: goes with prune.keep=N (roles to keep of each layer) and with no other")
        if self.same_roles and self.per_layer is False:
            raise UserError("prune.same_roles: true keeps roles in each layer, so prune.per_layer=false contradicts it")


@dataclass
class RunConfig:
    """What every verb that makes a run has."""

    seed: int = MISSING  #: of data order, initialisation and dropout
    outputs: str = MISSING  #: folder of run folders, relative to the caller's directory
    name: Optional[str] = MISSING  #: a label added to the run folder's name
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    method: Any = MISSING  #: a :class:`MethodConfig`


@dataclass
class TrainRun(RunConfig):
    """``lrk train``."""

    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: PredictConfig = field(default_factory=PredictConfig)
    #: an adapted run to train on, or that a calibrating method stands on; null is the pretrained model
    run: Optional[str] = MISSING


@dataclass
class EvaluateRun(RunConfig):
    """``lrk evaluate``."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    run: Optional[str] = MISSING  #: folder of a run with an adapter; null takes the newest finished one


@dataclass
class ScoreRun(RunConfig):
    """``lrk score``."""

    score: ScoreConfig = field(default_factory=ScoreConfig)
    run: Optional[str] = MISSING  #: as of ``lrk evaluate``

    @property
    def level(self) -> str:
        return self.score.level or "rank"

    def validate(self) -> None:
        self.score.validate()
        self.score.kind_of(self.level)


@dataclass
class PruneRun(RunConfig):
    """``lrk prune``."""

    prune: PruneConfig = field(default_factory=PruneConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)  #: used where ``run`` is not a scoring
    evaluate: PredictConfig = field(default_factory=PredictConfig)
    run: Optional[str] = MISSING  #: folder of a scoring, or of a run with an adapter; null takes the newest of them

    @property
    def level(self) -> str:
        return "module" if self.prune.modules else "rank"

    def validate(self) -> None:
        self.prune.validate()
        self.score.validate()
        if self.score.level not in (None, self.level):
            raise UserError(f"score.level: '{self.score.level}', but this takes {self.level}s out; leave it null")
        if self.score.kind_of(self.level) == "mixed" and self.prune.same_roles:
            raise UserError(
                "score.kind: 'mixed' needs a cut between modules, but prune.same_roles adds their scores up over "
                "layers (allowed: ablation, kl, taylor, magnitude, random, auto)"
            )


@dataclass
class ExportConfig:
    """What is written for other programs."""

    format: str = MISSING  #: ``lora`` (a PEFT adapter) or ``merged`` (the whole model with the updates in its weights)
    rank: Optional[int] = MISSING  #: of a LoRA's modules at most: the rest is cut off; null keeps all of the change
    #: largest difference of logits, relative to the largest logit, that is not refused; null is 0.001, of bf16 0.05
    max_error: Optional[float] = MISSING

    def validate(self) -> None:
        require_choice("export.format", self.format, ("lora", "merged"))
        if self.rank is not None:
            require_range("export.rank", self.rank, 1)
            if self.format == "merged":
                raise UserError(
                    "export.rank: merged weights hold the whole change; leave it out, or export.format=lora"
                )
        if self.max_error is not None:
            require_range("export.max_error", self.max_error, 0)


@dataclass
class ExportRun(RunConfig):
    """``lrk export``."""

    export: ExportConfig = field(default_factory=ExportConfig)
    run: Optional[str] = MISSING  #: as of ``lrk evaluate``


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
        if self.hardware.processes > 1:
            raise UserError(f"hardware.processes: {self.hardware.processes}, but answers are written by one process")


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


@dataclass
class StageConfig:
    """One stage of a recipe."""

    name: str = MISSING  #: unique in the recipe; ``{name}`` in a later override becomes this stage's run folder
    stage: str = MISSING  #: the verb: ``train``, ``evaluate``, …
    overrides: list[str] = field(default_factory=list)


@dataclass
class RecipeConfig:
    """A paper's whole pipeline."""

    name: str = MISSING
    stages: list[StageConfig] = MISSING


@dataclass
class RecipeRun:
    """``lrk run``."""

    outputs: str = MISSING
    name: Optional[str] = MISSING
    recipe: RecipeConfig = field(default_factory=RecipeConfig)


#: What each verb that takes overrides is configured by.
VERBS: dict[str, type] = {
    "train": TrainRun,
    "score": ScoreRun,
    "prune": PruneRun,
    "evaluate": EvaluateRun,
    "export": ExportRun,
    "generate": GenerateRun,
    "bench": BenchRun,
    "run": RecipeRun,
}
