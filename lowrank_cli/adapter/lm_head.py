"""The language model's head where it is needed: at the positions of answers, in chunks that bound memory.

    found = answers_at(model, inputs, answered)  # one pass of the model, without its head
    loss = found.losses(labels).sum()  # the head, chunk by chunk

Logits of all positions (B, T, V) are what a training step on a small model spends most of its memory on, and with a
vocabulary of 262,144 (Gemma 3 270M) most of its time. The head is the model's own: bias, scale and soft cap included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowrank_cli.adapter.linear import AdaptedLinear, LowRank
from lowrank_cli.errors import UserError

IGNORED = -100  #: label of positions without loss (torch's ``cross_entropy`` default)
LOGITS = 2**24  #: computed at once, 64 MiB of them in fp32; a loss holds three times that
TOLERANCE = 1e-2  #: of logits computed by themselves, relative to the largest: bf16 has three digits

_checked: WeakSet[nn.Module] = WeakSet()  #: models whose head gave by itself what their own forward gave


@dataclass
class Answers:
    """What a forward pass gives at N chosen positions, row by row of its batch."""

    states: Tensor  #: (N, D), what the head reads; (N, V), the logits, where ``head`` is None
    rows: Tensor  #: (N,), the row of the batch that each position is in
    head: Head | None

    def logits(self, index: slice | Tensor = slice(None)) -> Tensor:
        """(n, V), fp32, of the positions in ``index``."""
        states = self.states[index]
        return (states if self.head is None else self.head(states, self.rows[index])).float()

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The positions and logits (n, V), fp32, of one chunk after the other."""
        for span in self._spans():
            yield span, self.logits(span)

    def losses(self, labels: Tensor) -> Tensor:
        """Cross-entropy (N,), fp32, of ``labels`` (N,). Its gradient needs the logits of one chunk at a time."""
        head, recorded = self.head, torch.is_grad_enabled()
        found = []
        for span in self._spans():
            states, own, rows = self.states[span], labels[span], self.rows[span]
            if head is None or not recorded:
                found.append(F.cross_entropy(self.logits(span), own, reduction="none"))
            elif head.frozen:
                found.append(FrozenHeadLoss.apply(states, own, rows, head))  # type: ignore[no-untyped-call]
            else:
                found.append(checkpoint(_losses, head, states, own, rows, use_reentrant=False))
        return torch.cat(found)  # (N,)

    def computed(self) -> Answers:
        """The same with logits instead of states: they stay when the head changes, and take as much memory."""
        return Answers(self.logits(), self.rows, None)

    def _spans(self) -> list[slice]:
        """Chunks of like size."""
        count = len(self.states)
        chunks = math.ceil(count / self.head.chunk) if self.head else 1
        size = math.ceil(count / max(1, chunks))
        return [slice(start, start + size) for start in range(0, max(1, count), max(1, size))]


class Head:
    """From hidden states to logits, as the model's own forward goes on behind its body."""

    def __init__(self, model: PreTrainedModel, body: nn.Module, linear: nn.Module, output: type):
        self.model, self.body, self.linear, self.output = model, body, linear, output
        self.chunk = max(1, LOGITS // model.config.get_text_config().vocab_size)

    @property
    def frozen(self) -> bool:
        """Whether gradients flow through it to the states alone."""
        adapted = isinstance(self.linear, AdaptedLinear)
        return not adapted and not any(parameter.requires_grad for parameter in self.linear.parameters())

    def __call__(self, states: Tensor, rows: Tensor) -> Tensor:
        """(n, D) -> (n, V). ``rows`` (n,) say whose gates each of them has, where the head is adapted."""
        inputs, forward = states.unsqueeze(1), self.linear.forward  # (n, D) -> (n, 1, D): each a row of one token
        body = (inputs,) if self.output is tuple else self.output(last_hidden_state=inputs)
        ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
        replaced = {self.body: lambda *args, **kwargs: body, self.linear: lambda *args: forward(inputs)}
        with answering(replaced), _gates_of(self.linear, rows):
            return self.model.forward(input_ids=ids, use_cache=False).logits.squeeze(1)


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy of each state, whose gradient is computed at once and kept instead of logits.

    It takes two products with the head, like a loss over kept logits, where computing them again would take three.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, rows: Tensor, head: Head) -> Tensor:
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            logits = head(states, rows)  # (n, D) -> (n, V)
        index = labels.unsqueeze(1)  # (n, 1)
        scores = logits.detach().log_softmax(dim=-1, dtype=torch.float32)
        losses = -scores.gather(1, index).squeeze(1)  # (n,)
        slope = scores.exp_()
        slope.scatter_add_(1, index, -torch.ones_like(index, dtype=slope.dtype))  # p - 1 at the label, p elsewhere
        (gradient,) = torch.autograd.grad(logits, states, slope.to(logits.dtype))
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * slope.unsqueeze(1).to(gradient.dtype), None, None, None


def _losses(head: Head, states: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(head(states, rows).float(), labels, reduction="none")


def answers_at(
    model: nn.Module, inputs: Mapping[str, Any], answered: Tensor, network: PreTrainedModel | None = None
) -> Answers:
    """One forward pass of ``model``, hooks included, whose head waits for what is made of the result.

    A head of an unknown kind, or one that is not called as a module, computes all logits at once after all.

    Args:
        network: the model itself, where ``model`` wraps it (for data parallelism).

    Raises:
        UserError: logits are no function of what the head reads (which the first pass of a model tells).
    """
    network = model if network is None else network  # type: ignore[assignment]
    assert isinstance(network, PreTrainedModel)
    inputs = {"use_cache": False, **inputs}
    rows, linear = answered.nonzero()[:, 0], output_layer(network)  # (N,)
    body: nn.Module = network.get_decoder()
    if not isinstance(linear, nn.Linear | AdaptedLinear):
        return Answers(model(**inputs).logits[answered], rows, None)
    states: list[Tensor] = []
    outputs: list[type] = []
    unknown = network not in _checked and len(rows) > 0
    forward = linear.forward

    def take(hidden: Tensor) -> Tensor:
        states.append(hidden[answered])  # (B, T, D) -> (N, D)
        if not unknown:
            return hidden[:, :0]  # (B, T, D) -> (B, 0, D)
        with _gates_of(linear, rows[:1]):
            return forward(states[0][:1].unsqueeze(0))  # (1, 1, V), to compare with

    hook = body.register_forward_hook(lambda module, args, output: outputs.append(type(output)))
    try:
        with answering({linear: take}):
            logits = model(**inputs).logits
    finally:
        hook.remove()
    if not states:
        return Answers(logits[answered], rows, None)
    found = Answers(states[0], rows, Head(network, body, linear, outputs[0]) if outputs else None)
    if unknown:
        if not _alike(found, logits[0].detach().float()):
            raise UserError(
                f"model: the logits of this '{network.config.model_type}' depend on more than its head reads, so they "
                f"cannot be computed at single positions"
            )
        _checked.add(network)
    return found


@torch.no_grad()
def _alike(found: Answers, expected: Tensor) -> bool:
    """Whether the first position's logits are as ``expected`` (1, V)."""
    own = found.logits(slice(0, 1))
    return own.shape == expected.shape and bool((own - expected).abs().max() <= TOLERANCE * expected.abs().max())


def answer_losses(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, network: PreTrainedModel | None = None
) -> Tensor:
    """Cross-entropy (N,), fp32, of the ``labels`` (B, T) that are not :data:`IGNORED`, each predicted by the position
    before it. ``network``: see :func:`answers_at`."""
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # (B, T): of the token that follows
    answered = labels != IGNORED
    return answers_at(model, inputs, answered, network).losses(labels[answered])


def output_layer(model: PreTrainedModel) -> nn.Module | None:
    """The linear that makes logits; None of a model that makes none of tokens."""
    found: nn.Module | None = model.get_output_embeddings()
    return found


@contextmanager
def headless(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a head that is not adapted computes nothing: for passes whose logits nobody reads."""
    head = output_layer(model)
    with answering({head: lambda hidden: hidden[:, :0]} if isinstance(head, nn.Linear) else {}):
        yield


@contextmanager
def answering(replaced: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Inside, the forward of each module is the function given for it."""
    before = {module: vars(module).get("forward") for module in replaced}
    try:
        for module, answer in replaced.items():
            module.forward = answer
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own


@contextmanager
def _gates_of(linear: nn.Module, rows: Tensor) -> Iterator[None]:
    """Inside, gates of an adapted ``linear`` that differ from row to row are those of ``rows`` (n,)."""
    with ExitStack() as stack:
        for part, _ in linear.updates if isinstance(linear, AdaptedLinear) else ():
            ranks, module = part.rank_gate, part.module_gate
            stack.callback(_set_gates, part, ranks, module)
            own = ranks[rows] if ranks is not None and ranks.dim() == 2 else ranks  # (B, R) -> (n, R)
            _set_gates(part, own, module[rows] if isinstance(module, Tensor) else module)  # (B,) -> (n,)
        yield


def _set_gates(part: LowRank, ranks: Tensor | None, module: Tensor | float | None) -> None:
    part.rank_gate, part.module_gate = ranks, module
