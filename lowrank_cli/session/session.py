"""A session: task, model, tokenizer and method of a run, loaded on its hardware."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_cli import methods, tasks
from lowrank_cli.adapter.adapted_model import Adapter, fingerprint
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.head_loss import head_losses
from lowrank_cli.adapter.image_input import image_tokens, input_width
from lowrank_cli.adapter.lm_head import answer_losses
from lowrank_cli.adapter.training.packing import on_device, packed_inputs, require_packable
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Adapts, Calibrates, ChoosesSites, Method
from lowrank_cli.models.load import Head, load
from lowrank_cli.runs import Run
from lowrank_cli.schema import EvaluateConfig, PredictConfig, RunConfig, TaskConfig, TrainRun, check_task
from lowrank_cli.scoring.probe import Probe
from lowrank_cli.session.adapter_run import check_chat, method_of, newest_run_note
from lowrank_cli.session.device import greet, prepare
from lowrank_cli.session.processes import Processes
from lowrank_cli.tasks import encode, images
from lowrank_cli.tasks.chat import Chat, chat_of
from lowrank_cli.tasks.task import Example, Task

BATCH_SIZE = 16  #: prompts in a batch, for a verb without ``evaluate.batch_size``


@dataclass
class Session:
    """A model ready for training or inference, and its data."""

    config: RunConfig
    accelerator: Processes
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  #: absent (None) for a model of images, which nothing asks for it
    processor: Any  #: image processor of a model of images, else None
    method: Method
    adapter: Adapter | None  #: None for a method that adapts nothing
    fingerprint: str  #: of the model's weights
    header: str  #: the first line a run prints
    max_positions: int | None  #: longest input in tokens, where the model has a position table
    adapter_run: Path | None  #: the earlier run that holds the adapter's weights
    #: the chat template of each task of a mix, or of ``""``; empty for plain prompts
    chats: dict[str, Chat] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def greet(self, run: Run, *more: str) -> None:
        """Choose the CPU threads and print the run's first lines: the model, how it computes, and ``more``."""
        source = newest_run_note(self.config, run)
        notes = dict.fromkeys([*([self.task.note] if self.task.note else []), *map(str, self.chats.values()), *more])
        greet(run, self.config.hardware, self.model, self.header, source=source, notes=notes)

    def note_device(self, run: Run) -> None:
        """Record the GPU and its peak memory in run.json, which already describes the CPU."""
        if self.device.type == "cuda":
            run.update(
                device=torch.cuda.get_device_name(self.device),
                device_memory_bytes=torch.cuda.max_memory_allocated(self.device),
            )

    def autocast(self) -> torch.autocast:
        """bf16 arithmetic on fp32 weights where the hardware config asks for it, else nothing."""
        enabled = self.config.hardware.precision == "autocast"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @property
    def evaluate(self) -> PredictConfig:
        """``evaluate`` in the config of a verb that predicts."""
        return self.config.evaluate  # type: ignore[attr-defined]

    @property
    def batch_size(self) -> int:
        """Prompts in a batch."""
        evaluate = getattr(self.config, "evaluate", None)
        return BATCH_SIZE if evaluate is None else evaluate.batch_size

    @property
    def width(self) -> int | None:
        """Hidden size of what reads texts or images; None if the model does not say."""
        return input_width(self.model)

    @property
    def encoder(self) -> bool:
        return self.config.model.kind == "encoder"

    def max_length(self, shots: int = 0, task: str = "") -> int:
        """Largest number of tokens in a prompt with ``shots`` demonstrations and its answer. ``task``: one of a mix."""
        config = self.config.task
        lengths = [config.max_length, *([config.parts[task].max_length] if task else [])]
        wanted = min(lengths) * (shots + 1)
        return min(wanted, self.max_positions or wanted)

    def max_new_tokens(self, task: str = "") -> int:
        """Largest number of tokens in a generated answer. ``task``: one of a mix."""
        config = self.config.task
        return min([config.max_new_tokens, *([config.parts[task].max_new_tokens] if task else [])])

    @property
    def prompt_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of prompts: it adds no special tokens to what a chat template wrote."""
        return next((chat.tokenizer for chat in self.chats.values()), self.tokenizer)

    @property
    def chat_hashes(self) -> dict[str, str]:
        """The hash of each task's chat template."""
        task = self.config.task
        return {task.parts.get(name, task).name: chat.hash for name, chat in self.chats.items()}

    def stops(self, task: str = "") -> list[int]:
        """The tokens that end an answer; the first is the one that is trained. ``task``: one of a mix."""
        return self.chats[task].stops if self.chats else [self.tokenizer.eos_token_id]

    def encode(self, examples: Sequence[Example]) -> list[Any]:
        """Encoded examples: ``Encoded`` for a causal model, ``EncodedText`` or ``EncodedImage`` for an encoder."""
        if self.encoder:
            labels: int = self.model.config.num_labels  # type: ignore[assignment]
            if self.processor is not None:
                patches = image_tokens(self.model.config.to_dict())
                return [images.encode(example, labels, patches) for example in examples]
            return [encode.encode_text(self.tokenizer, e, self.max_length(task=e.task), labels) for e in examples]
        encoded: list[Any] = [None] * len(examples)
        for task in dict.fromkeys(example.task for example in examples):
            indices = [index for index, example in enumerate(examples) if example.task == task]
            cut = self.config.task.parts.get(task, self.config.task).lenient
            group = [examples[index] for index in indices]
            length = self.max_length(task=task)
            if self.chats:
                rows = [self.chats[task].encode(example, length, cut) for example in group]
            else:
                rows = encode.encode_all(self.tokenizer, group, length, cut)
            for index, row in zip(indices, rows, strict=True):
                encoded[index] = row
        return encoded

    def weight(self, encoded: Any) -> int:
        """Weight of an example in a mean loss: the number of its response tokens, or of an encoder's answers."""
        answered: int = encoded.answered
        return answered

    def batch(self, encoded: Sequence[Any]) -> dict[str, Tensor]:
        """A training batch on the device, with ``prompt_mask`` only if the method routes by it."""
        if self.processor is not None:
            batch = images.collate(encoded, self.processor)
            return self._on_device(batch | {"pixel_values": batch["pixel_values"].to(self.model.dtype)})
        collate = encode.collate_encoder if self.encoder else encode.collate_causal
        return self._on_device(collate(encoded, self.tokenizer.pad_token_id))

    def packed(self, encoded: Sequence[Any]) -> dict[str, Any]:
        """:meth:`batch` of a causal model as one row without padding, for a model prepared by :func:`pack`."""
        return self._on_device(encode.collate_packed(encoded) | packed_inputs([row.length for row in encoded]))

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        if not (self.adapter and self.adapter.routing):
            batch.pop("prompt_mask", None)
        return on_device(batch, self.device)

    def probe(self, size: int, tokens: int) -> Probe:
        """This process's share of a fixed batch of ``size`` dev examples to score on (all of them if there are fewer).

        ``tokens`` limits the tokens in one forward pass.
        """
        dev, world = self.task.dev, self.accelerator.num_processes
        if min(size, len(dev)) < world:
            raise UserError(
                f"hardware.processes: {world} cannot share the {min(size, len(dev))} dev examples to score on"
            )
        chosen = random.Random(self.config.seed).sample(dev, min(size, len(dev)))
        mine = self.encode(chosen[self.accelerator.process_index :: world])
        return Probe(
            self.batch(mine),
            tokens,
            self.autocast,
            lambda tensor: self.accelerator.reduce(tensor, reduction="sum"),
            share=(self.accelerator.process_index, world),
        )

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy summed over response tokens (labels shifted), or an encoder's :func:`head_losses`; in fp32.

        ``model`` is the session's model, or its wrapper for data parallelism.
        """
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if self.encoder:
            return head_losses(model(**inputs).logits, batch["labels"]).sum()
        return answer_losses(model, inputs, batch["labels"], self.model).sum()


def start(config: RunConfig, adapter_run: Path | None = None) -> Session:
    """Load everything that ``config`` names, seeded.

    The adapter is freshly initialised; :func:`load_adapter` loads its weights.

    Args:
        adapter_run: the earlier run whose adapter is used, as composition found it.

    Raises:
        UserError: something does not fit, if possible before anything slow happens.
    """
    accelerator = prepare(config.hardware)
    method = methods.create(config.method)
    adapts = method if adapter_run is None or isinstance(method, Adapts) else method_of(Run.open(adapter_run))
    check_task(config.model, config.task)
    task = tasks.load(config.task, _only_split(config, method))
    shots = getattr(getattr(config, "evaluate", None), "shots", 0)
    if shots > len(task.train):
        raise UserError(
            f"evaluate.shots: {shots} are asked for, there are {len(task.train)} demonstrations to draw from"
        )
    torch.manual_seed(config.seed)
    head = Head.of(config.task) if config.model.kind == "encoder" else None
    checks: list[Callable[[PreTrainedModel], object]] = []  # of a model without weights, before a download
    if isinstance(adapts, ChoosesSites):
        checks.append(adapts.sites)
    if isinstance(config, TrainRun) and config.train.packing:
        checks.append(require_packable)
    loaded = load(config.model, config.hardware, head, checks)
    model, divided = loaded.model.requires_grad_(False), config.hardware.divided
    if not divided:
        model.to(accelerator.device)
    adapter = adapts.adapt(model) if isinstance(adapts, Adapts) else None  # declares its trainable tensors
    identity = adapter.fingerprint if adapter else fingerprint(model)  # before a process holds only a share
    if divided:
        accelerator.divide(model, adapter, config.hardware)
    session = Session(
        config,
        accelerator,
        task,
        model,
        loaded.tokenizer,
        loaded.processor,
        method,
        adapter,
        identity,
        header=loaded.header,
        max_positions=loaded.max_positions,
        adapter_run=adapter_run,
        chats={} if loaded.tokenizer is None else chats_of(loaded.tokenizer, config.task),
    )
    return replace(session, task=_in_chat(session)) if session.chats else session


def _only_split(config: RunConfig, method: Method) -> str | None:
    """The only split that is used: of an evaluation without demonstrations and without anything to fit."""
    evaluate = getattr(config, "evaluate", None)
    if not isinstance(evaluate, EvaluateConfig) or evaluate.shots or isinstance(method, Calibrates):
        return None
    return evaluate.split


def chats_of(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> dict[str, Chat]:
    """The chat template of each task of a mix, or of the only task. Raises UserError if only some tasks have one."""
    chats: dict[str, Chat] = {}
    for name, config in (task.parts or {"": task}).items():
        if chat := chat_of(tokenizer, config):
            chats[name] = chat
    plain = [name for name in task.parts if name not in chats]
    if chats and plain:
        raise UserError(
            f"task.parts.{plain[0]}.chat: {task.parts[plain[0]].chat}, but {next(iter(chats))} is asked in a chat "
            f"template; set task.parts.{plain[0]}.chat=true"
        )
    return chats


def _in_chat(session: Session) -> Task:
    """The task with prompts of dev and test as the model reads them. Training encodes whole conversations."""

    def rendered(example: Example) -> Example:
        room = 0 if example.choices else session.max_new_tokens(example.task)
        return session.chats[example.task].rendered(example, session.max_length(task=example.task) - room)

    task = session.task
    return replace(task, dev=[rendered(item) for item in task.dev], test=[rendered(item) for item in task.test])


def load_adapter(session: Session) -> None:
    """Load the adapter's weights from the run that holds them."""
    if session.adapter is not None:
        assert session.adapter_run is not None, "composition finds a run for every method that trains"
        folder = session.adapter_run / "adapter"
        check_chat(session.chat_hashes, save_load.load(session.adapter, folder), folder)
