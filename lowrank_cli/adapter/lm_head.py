"""The language model's head at answer positions only, in chunks that bound memory.

    answers = answers_at(model, inputs, answered)  # one pass of the model, without its head
    loss = answers.losses(labels).sum()  # the head, chunk by chunk

Logits of all positions (B, T, V) take most of a small model's memory in training, and with a vocabulary of 262,144
(Gemma 3 270M) most of its time. The model's own head is used, with its bias, scale and soft cap.
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

from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.low_rank import LowRank
from lowrank_cli.errors import UserError

IGNORED = -100  #: label of positions without loss (torch's ``cross_entropy`` default)
LOGITS = 2**24  #: logits computed at once: 64 MiB in fp32, and a loss needs three times that
TOLERANCE = 1e-2  #: largest difference from the model's own logits, relative to the largest (bf16 has three digits)

_checked: WeakSet[nn.Module] = WeakSet()  #: models whose head was compared with their own forward


@dataclass
class Answers:
    """The result of a forward pass at N positions, ordered by batch row."""

    states: Tensor  #: (N, D), the head's input; if ``head`` is None, the logits (N, V)
    rows: Tensor  #: (N,), the batch row of each position
    head: Head | None

    def logits(self, index: slice | Tensor = slice(None)) -> Tensor:
        """Logits (n, V), fp32, of the positions in ``index``."""
        states = self.states[index]
        return (states if self.head is None else self.head(states, self.rows[index])).float()

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Positions and logits (n, V), fp32, chunk by chunk."""
        for span in self._spans():
            yield span, self.logits(span)

    def losses(self, labels: Tensor) -> Tensor:
        """Cross-entropy (N,), fp32, of ``labels`` (N,). Its backward pass holds the logits of one chunk at a time."""
        head, recorded = self.head, torch.is_grad_enabled()
        losses = []
        for span in self._spans():
            states, targets, rows = self.states[span], labels[span], self.rows[span]
            if head is None or not recorded:
                losses.append(F.cross_entropy(self.logits(span), targets, reduction="none"))
            elif head.frozen:
                losses.append(FrozenHeadLoss.apply(states, targets, rows, head))  # type: ignore[no-untyped-call]
            else:
                losses.append(checkpoint(_losses, head, states, targets, rows, use_reentrant=False))
        return torch.cat(losses)  # (N,)

    def computed(self) -> Answers:
        """The same with logits in place of states: independent of later changes to the head, at the cost of memory."""
        return Answers(self.logits(), self.rows, None)

    def _spans(self) -> list[slice]:
        """Chunks of similar size."""
        count = len(self.states)
        chunks = math.ceil(count / self.head.chunk) if self.head else 1
        size = math.ceil(count / max(1, chunks))
        return [slice(start, start + size) for start in range(0, max(1, count), max(1, size))]


class Head:
    """Maps hidden states to logits by the model's own forward, with the decoder's output replaced."""

    def __init__(self, model: PreTrainedModel, body: nn.Module, linear: nn.Module, output: type):
        self.model, self.body, self.linear, self.output = model, body, linear, output
        self.chunk = max(1, LOGITS // model.config.get_text_config().vocab_size)

    @property
    def frozen(self) -> bool:
        """Whether only the states take gradients."""
        adapted = isinstance(self.linear, AdaptedLinear)
        return not adapted and not any(parameter.requires_grad for parameter in self.linear.parameters())

    def __call__(self, states: Tensor, rows: Tensor) -> Tensor:
        """(n, D) -> (n, V). An adapted head uses the gates of the batch rows ``rows`` (n,)."""
        inputs, forward = states.unsqueeze(1), self.linear.forward  # (n, D) -> (n, 1, D): rows of one token
        body = (inputs,) if self.output is tuple else self.output(last_hidden_state=inputs)
        ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
        replaced = {self.body: lambda *args, **kwargs: body, self.linear: lambda *args: forward(inputs)}
        with replaced_forwards(replaced), _gates_of(self.linear, rows):
            return self.model.forward(input_ids=ids, use_cache=False).logits.squeeze(1)


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy of each state; the forward pass computes the gradient too and keeps it instead of the logits.

    That takes two products with the head, as if logits were kept; recomputing them would take three.
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
    """One forward pass of ``model``, hooks included, that leaves its head to the methods of the result.

    A head of an unknown kind, or one that is not called as a module, computes all logits in the pass.

    Args:
        inputs: keyword arguments of the model.
        answered: (B, T), True at the positions wanted.
        network: the model itself if ``model`` is a wrapper for data parallelism.

    Raises:
        UserError: the logits depend on more than the head's input (checked in the first pass of a model).
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

    def collect(hidden: Tensor) -> Tensor:
        states.append(hidden[answered])  # (B, T, D) -> (N, D)
        if not unknown:
            return _no_positions(hidden)
        with _gates_of(linear, rows[:1]):
            return forward(states[0][:1].unsqueeze(0))  # (1, 1, V), for comparison

    hook = body.register_forward_hook(lambda module, args, output: outputs.append(type(output)))
    try:
        with replaced_forwards({linear: collect}):
            logits = model(**inputs).logits
    finally:
        hook.remove()
    if not states:
        return Answers(logits[answered], rows, None)
    answers = Answers(states[0], rows, Head(network, body, linear, outputs[0]) if outputs else None)
    if unknown:
        if not _same_first_logits(answers, logits[0].detach().float()):
            raise UserError(
                f"model: the logits of this '{network.config.model_type}' depend on more than its head reads, so they "
                f"cannot be computed at single positions"
            )
        _checked.add(network)
    return answers


@torch.no_grad()
def _same_first_logits(answers: Answers, expected: Tensor) -> bool:
    """Whether the logits of the first position equal ``expected`` (1, V) up to rounding."""
    first = answers.logits(slice(0, 1))
    return first.shape == expected.shape and bool((first - expected).abs().max() <= TOLERANCE * expected.abs().max())


def answer_losses(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, network: PreTrainedModel | None = None
) -> Tensor:
    """Next-token cross-entropy (N,), fp32, of the ``labels`` (B, T) that are not :data:`IGNORED`.

    ``network``: see :func:`answers_at`.
    """
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # (B, T), shifted to the position that predicts them
    answered = labels != IGNORED
    return answers_at(model, inputs, answered, network).losses(labels[answered])


def output_layer(model: PreTrainedModel) -> nn.Module | None:
    """The linear that computes token logits; None if the model has none."""
    layer: nn.Module | None = model.get_output_embeddings()
    return layer


@contextmanager
def headless(model: PreTrainedModel) -> Iterator[None]:
    """Skip the head, unless it is adapted, in passes whose logits are not needed."""
    head = output_layer(model)
    with replaced_forwards({head: _no_positions} if isinstance(head, nn.Linear) else {}):
        yield


def _no_positions(hidden: Tensor) -> Tensor:
    """(B, T, D) -> (B, 0, D), and no view: FSDP warns of views that leave a model."""
    return hidden.new_empty(len(hidden), 0, hidden.shape[-1])


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Inside, each module's forward is the given function."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, original in before.items():
            if original is None:
                vars(module).pop("forward", None)
            else:
                module.forward = original


@contextmanager
def _gates_of(linear: nn.Module, rows: Tensor) -> Iterator[None]:
    """Inside, per-row gates of an adapted ``linear`` are those of the batch rows ``rows`` (n,)."""
    with ExitStack() as stack:
        for module, _ in linear.updates if isinstance(linear, AdaptedLinear) else ():
            rank_gate, module_gate = module.rank_gate, module.module_gate
            stack.callback(_set_gates, module, rank_gate, module_gate)
            ranks = rank_gate[rows] if rank_gate is not None and rank_gate.dim() == 2 else rank_gate  # (B, R) -> (n, R)
            _set_gates(module, ranks, module_gate[rows] if isinstance(module_gate, Tensor) else module_gate)
        yield


def _set_gates(module: LowRank, rank_gate: Tensor | None, module_gate: Tensor | float | None) -> None:
    module.rank_gate, module.module_gate = rank_gate, module_gate
