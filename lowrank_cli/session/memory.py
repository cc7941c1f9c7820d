"""How much memory a training step takes on each device, without weights: the step itself runs, on fake tensors.

So the estimate knows what a method adds, what backward passes keep or compute again, and that logits exist only at
answer positions. It is the memory of tensors: Python, its libraries and the CUDA context come on top, and so do the
gaps between blocks of memory (:data:`USABLE`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lowrank_cli import methods, tasks
from lowrank_cli.adapter.files import optimizer_state
from lowrank_cli.adapter.image_input import image_shape, image_tokens
from lowrank_cli.adapter.lm_head import answers_at
from lowrank_cli.adapter.target_sites import layers
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Adapts, AddsLoss
from lowrank_cli.models.outline import outline, outline_tokenizer
from lowrank_cli.models.prepack import free_memory
from lowrank_cli.schema import TrainRun
from lowrank_cli.session import optimizers
from lowrank_cli.session.ledger import Ledger, counting
from lowrank_cli.session.session import chats_of
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example

#: Share of a device's memory that tensors can fill. A CUDA context and gaps take the rest; on a CPU, glibc's heap keeps
#: a third more than is in use (SmolLM2, LoRA, 16 rows of 64 tokens: 1.85 GiB resident, 1.35 GiB of tensors).
USABLE = {"cuda": 0.9, "cpu": 0.7}
LONGEST = 64  #: examples with the most characters, of which the one with the most tokens is taken


@dataclass(frozen=True)
class Length:
    """The tokens of one example."""

    tokens: int
    answered: int  #: of these, those with loss
    source: str  #: where the numbers come from


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on one device in a training step. ``peak`` is not their sum: they are not all there at once."""

    weights: int  #: of the model, the trained ones of the adapter excluded
    adapter: int
    gradients: int  #: of the adapter, with the copies that data parallelism sends
    optimizer: int
    method: int  #: what the method keeps besides
    activations: int  #: kept for the backward pass
    logits: int  #: of one chunk of answer positions, with their gradients
    peak: int


@dataclass(frozen=True)
class Estimate:
    """The memory of a run."""

    rows: int  #: examples of a device in one pass
    length: Length
    memory: Memory
    available: float | None  #: bytes of a device; None if there is no such device here
    most_rows: int | None  #: the most examples in one pass that fit ``available``


class TrainingStep:
    """An optimizer step of a run, on fake tensors. Create and use it inside ``counting() as ledger``."""

    def __init__(self, config: TrainRun, length: Length, ledger: Ledger):
        self.config, self.length, self.ledger = config, length, ledger
        self.encoder = config.model.kind == "encoder"
        dtype = torch.bfloat16 if config.hardware.precision == "bf16" else torch.float32
        model = outline(config.model, "cpu", dtype)
        assert model is not None, "length_of has read its files"
        if config.hardware.attention == "eager":
            model.set_attn_implementation("eager")
        self.model = model.requires_grad_(False)
        self.method = methods.create(config.method)
        assert isinstance(self.method, Adapts)
        self.adapter = self.method.adapt(self.model)
        self.optimizer = optimizers.create(config.train, self.adapter, {})
        again = config.hardware.gradient_checkpointing.removesuffix("_offloaded")
        recompute(self.model, again, config.hardware.compile)
        self.model.train()
        trained = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        for parameter in trained:  # the first step makes the moments
            parameter.grad = torch.zeros_like(parameter)
        self._update()

    def memory(self, rows: int) -> Memory:
        """The memory of a step of micro-batches of ``rows`` examples."""
        trained = _bytes(self.adapter.trained.values())
        method = self.method.kept_bytes(self.adapter)
        moments = _bytes(optimizer_state.moments(self.optimizer).values())
        copies = 2 if self.config.hardware.world > 1 else 1  # the bucket in which they are summed
        activations = logits = peak = 0
        for _ in range(min(2, self.config.train.gradient_accumulation)):  # from the second on gradients are there
            before = self.ledger.live
            activations, logits, highest = self._backward(rows, before)
            peak = max(peak, highest)
        self._update()
        elsewhere = self._elsewhere()
        mask = self._mask(rows)
        extra = method + mask + (copies - 1) * trained - elsewhere
        weights = _bytes(self.model.parameters()) + _bytes(self.model.buffers()) - trained - elsewhere
        return Memory(weights, trained, copies * trained, moments, method, activations + mask, logits, peak + extra)

    def _mask(self, rows: int) -> int:
        """Bytes of the mask of a packed row of ``rows`` examples, one for each pair of tokens; in FlashAttention none.

        Otherwise a packed row takes what a batch without padding takes.
        """
        masked = self.config.train.packing and self.config.hardware.attention != "flash"
        return (rows * self.length.tokens) ** 2 if masked else 0

    def _elsewhere(self) -> int:
        """Bytes of frozen weights that other devices hold, without the two layers that are gathered at a time."""
        hardware = self.config.hardware
        if not hardware.divided:
            return 0
        frozen = [_bytes(p for p in layer.parameters() if not p.requires_grad) for layer in layers(self.model)]
        return sum(frozen) - sum(frozen) // hardware.sharers - 2 * max(frozen)

    def _backward(self, rows: int, before: int) -> tuple[int, int, int]:
        """One micro-batch: the bytes of activations above ``before``, of logits, and the peak."""
        ledger, tokens = self.ledger, self.length.tokens
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["attention_mask"][0, -1] = 0  # padding, so that attention reads a mask
        if self.config.model.images:
            inputs = {"pixel_values": torch.zeros(rows, *image_shape(self.model))}
        if self.adapter.routing:
            inputs["prompt_mask"] = torch.ones_like(ids)
        ledger.selected = rows * self.length.answered
        ledger.restart()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.hardware.precision == "autocast"):
            if self.encoder:
                logits = self.model(**inputs).logits.float()
                kept, highest = ledger.live, ledger.peak
                loss = F.cross_entropy(logits, torch.zeros(rows, dtype=torch.long), reduction="sum")
                del logits
            else:
                answers = answers_at(self.model, inputs, torch.ones_like(ids, dtype=torch.bool))
                kept, highest = ledger.live, ledger.peak
                ledger.restart()
                loss = answers.losses(torch.zeros(ledger.selected, dtype=torch.long)).sum()
                del answers
            if isinstance(self.method, AddsLoss):
                loss = loss + self.method.extra_loss(self.adapter)
        head = ledger.peak
        loss.backward()
        del loss
        return kept - before, head - kept, max(highest, ledger.peak)

    def _update(self) -> None:
        self.optimizer.step()
        self.model.zero_grad()

    def most_rows(self, rows: int, limit: float) -> int:
        """The most examples in one pass whose peak fits ``limit`` bytes; ``rows`` of them are the first guess."""
        one = self.memory(rows).peak
        slope = max(1, self.memory(2 * rows).peak - one) / rows  # bytes of an example
        most = max(0, math.floor(rows + (limit - one) / slope))
        while most and (over := self.memory(most).peak - limit) > 0:
            steepest = max(slope, self._mask(most) - self._mask(most - 1))  # a mask grows with the square
            most = max(0, most - math.ceil(over / steepest))
        return most


def estimate(config: TrainRun, available: float | None = None) -> Estimate | None:
    """The memory of a training; None if the model's configuration is not on this machine.

    Args:
        available: bytes of each device; None for what is visible here.

    Raises:
        UserError: the method does not fit the model, or the memory is not estimated with these settings.
    """
    if kind := config.hardware.quantization:
        raise UserError(f"--memory: weights in 4 bits are not estimated (hardware.quantization={kind})")
    if config.train.optimizer == "adamw_8bit":
        raise UserError("--memory: moments in 8 bits are not estimated (train.optimizer=adamw_8bit)")
    if config.train.packing and config.hardware.attention == "eager":
        raise UserError(
            "--memory: scores of packed rows are not estimated (train.packing=true hardware.attention=eager)"
        )
    length = length_of(config)
    if length is None:
        return None
    hardware = config.hardware
    rows = math.ceil(config.train.batch_size / (config.train.gradient_accumulation * hardware.world))
    available = _visible(hardware.device) if available is None else available
    with counting() as ledger:
        step = TrainingStep(config, length, ledger)
        memory = step.memory(rows)
        most = None if available is None else step.most_rows(rows, available * USABLE[hardware.device])
    return Estimate(rows, length, memory, available, most)


def length_of(config: TrainRun) -> Length | None:
    """The longest training example, or what the task allows if its data are not on this machine.

    None if the model's tokenizer is not.
    """
    if config.model.images:
        model = outline(config.model)
        return model and Length(image_tokens(model.config.to_dict()), 1, "the patches of an image")
    tokenizer, task = outline_tokenizer(config.model), config.task
    if tokenizer is None:
        return None
    try:
        examples = tasks.load(task).train
    except UserError:
        answered = task.max_length // 2 if task.answer in ("free", "chat", "mix") else 2
        return Length(task.max_length, answered, "task.max_length, as the data are not on this machine")
    examples = sorted(examples, key=_characters, reverse=True)[:LONGEST]
    chats = chats_of(tokenizer, task)
    longest = Length(0, 0, "")
    for example in examples:
        single = task.parts.get(example.task, task)
        most = min(task.max_length, single.max_length)
        if config.model.kind == "encoder":
            row = Length(len(encode.encode_text(tokenizer, example, most, len(task.label_words)).input_ids), 1, "")
        else:
            if chats:
                encoded = chats[example.task].encode(example, most, single.lenient)
            else:
                (encoded,) = encode.encode_all(tokenizer, [example], most, single.lenient)
            row = Length(len(encoded.input_ids), encoded.answered, "")
        longest = Length(
            max(longest.tokens, row.tokens), max(longest.answered, row.answered), "the longest training example"
        )
    return longest


def _characters(example: Example) -> int:
    return len(example.prompt) + len(example.answer) + sum(len(turn.content) for turn in example.turns)


def _visible(device: str) -> float | None:
    """Bytes of memory of this machine's CUDA device, or free ones of its CPU."""
    if device == "cpu":
        return free_memory() or None
    return float(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, shared ones once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
