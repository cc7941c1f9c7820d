"""What a method does around a training loop that is not ours: hooks of the model and of its optimizer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.lm_head import IGNORED
from lowrank_cli.errors import UserError, require_range
from lowrank_cli.methods.protocol import (
    AddsLoss,
    AfterStep,
    BeforeStep,
    Method,
    OwnRates,
    Prepares,
    Settles,
    Start,
    Step,
)
from lowrank_cli.scoring.probe import Probe

if TYPE_CHECKING:
    from transformers import TrainerCallback

#: What a model is called with: ``input_ids`` (B, T), ``attention_mask`` (B, T), ``labels`` (B, T) or (B,), …
Batch = Mapping[str, Tensor]

_log = logging.getLogger("lowrank_cli")


class Training:
    """Lets ``method`` take part in the training of ``adapter``. ``fresh``: it was neither loaded nor trained before."""

    def __init__(self, adapter: Adapter, method: Method, fresh: bool):
        self.adapter, self.method, self.fresh = adapter, method, fresh
        self.history: list[dict[str, Any]] = []
        self._optimizer: torch.optim.Optimizer | None = None  # while a training runs
        self._own_pass = False  # of the method, not of the loop
        self._added = False  # the method's term is in the loss of this step
        self._now: Step  # the step that runs
        self._done = 0  # steps
        self._tokens = 0  # read by the loop so far
        adapter.model.register_forward_pre_hook(self._before_pass, with_kwargs=True, prepend=True)
        adapter.model.register_forward_hook(self._after_pass, with_kwargs=True)
        for parameter in adapter.trained.values() if self._acts() else ():
            parameter.register_post_accumulate_grad_hook(self._refuse_outside)

    def stepped(self) -> dict[str, nn.Parameter]:
        """What the optimizer steps, by name."""
        return {name: one for name, one in self.adapter.trained.items() if name not in self.adapter.deferred}

    def extra_loss(self) -> Tensor:
        """See :meth:`lowrank_cli.api.adapted.Adapter.extra_loss`."""
        self._added = True
        if isinstance(self.method, AddsLoss):
            return self.method.extra_loss(self.adapter)
        return torch.zeros((), device=self.adapter.model.device)

    @contextmanager
    def running(
        self,
        optimizer: torch.optim.Optimizer,
        steps: int,
        train: Iterable[Batch],
        dev: Iterable[Batch],
        steps_per_epoch: int | None,
    ) -> Iterator[None]:
        """See :meth:`lowrank_cli.api.adapted.Adapter.training`."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside what Accelerate makes of it
        dev = list(dev)
        self._check(optimizer, steps, dev)
        if steps_per_epoch is None:
            steps_per_epoch = (len(train) if isinstance(train, Sized) else 0) or steps
        if self.fresh and isinstance(self.method, Prepares):
            log = partial(self._report, 0)
            self.method.prepare(Start(self.adapter, partial(self._read, train), _alone, log, _log.info))
        self.fresh = self._added = False
        self._done = self._tokens = 0
        before = partial(self._before_step, steps, dev, steps_per_epoch)
        hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(self._after_step)]
        self._optimizer = optimizer
        try:
            yield
        finally:
            self._optimizer = None
            for hook in hooks:
                hook.remove()
        self._check_end(steps)

    def _check(self, optimizer: torch.optim.Optimizer, steps: int, dev: Sequence[Batch]) -> None:
        """Raise UserError where the training would not be what the method means."""
        method, name = self.method, self.method.config.name
        require_range("steps", steps, 1)
        if self._optimizer is not None:
            raise UserError("training: one runs already on this adapter")
        if self._acts() and _processes() > 1:
            raise UserError(f"training: {name} acts between steps, here in one process only; use lrk train for several")
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        held = {key: groups[id(one)] for key, one in self.adapter.trained.items() if id(one) in groups}
        again = "make it of adapter.parameter_groups(LEARNING_RATE)"
        if missing := self.stepped().keys() - held.keys():
            raise UserError(f"optimizer: it lacks {len(missing)} of the trained tensors ('{min(missing)}'); {again}")
        if surplus := held.keys() & self.adapter.deferred:
            raise UserError(f"optimizer: it holds '{min(surplus)}', which {name} steps itself; {again}")
        rates = method.learning_rates(self.adapter) if isinstance(method, OwnRates) else {}
        for tensor, rate in rates.items():
            if (own := held[tensor].get("initial_lr", held[tensor]["lr"])) != rate:
                raise UserError(f"optimizer: '{tensor}' has the learning rate {own}, {name} says {rate}; {again}")
        if isinstance(method, AfterStep) and not isinstance(optimizer, torch.optim.Adam):
            raise UserError(f"optimizer: {type(optimizer).__name__} does not go with {name}; use torch.optim.AdamW")
        if (use := method.dev_use()) and not dev:
            raise UserError(f"dev: missing; {name} {use}, so give adapter.training(…, dev=BATCHES)")
        for batch in dev:
            _require_labels(batch, "dev")

    def _acts(self) -> bool:
        """Whether a loop without :meth:`running` would miss something."""
        return isinstance(self.method, BeforeStep | AfterStep | AddsLoss | Prepares)

    def _check_end(self, steps: int) -> None:
        """Say what was not done."""
        name = self.method.config.name
        if self._done == 0:
            raise UserError("training: no step was taken with this optimizer")
        reason = self.method.unsettled() if isinstance(self.method, Settles) else None
        if reason or (self._acts() and self._done != steps):
            warnings.warn(
                f"{name}: {self._done} of {steps} steps were taken{f'; {reason}' if reason else ''}", stacklevel=6
            )

    def _before_pass(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Count tokens; tell routers which of them are the prompt."""
        labels = kwargs.get("labels")
        if self._in_loop():
            given = [*args, *(kwargs.get(key) for key in ("input_ids", "inputs_embeds"))]
            self._tokens += next((one.shape[0] * one.shape[1] for one in given if one is not None), 0)
        if self.adapter.routing and labels is not None and labels.dim() == 2 and kwargs.get("prompt_mask") is None:
            kwargs["prompt_mask"] = prompt_mask(labels, kwargs.get("attention_mask"))
        return args, kwargs

    def _after_pass(self, model: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> None:
        """Add the method's term to the loss of a training pass.

        Trainer, where it accumulates, divides the loss by all answer tokens of a step; the term is then weighted by
        this batch's share of them.
        """
        loss = getattr(output, "loss", None)
        if loss is None or not self._in_loop() or not isinstance(self.method, AddsLoss):
            return
        extra, count = self.extra_loss(), kwargs.get("num_items_in_batch")
        if count is not None:
            labels = kwargs["labels"]
            extra = extra * (labels[..., 1:] if labels.dim() == 2 else labels).ne(IGNORED).sum() / count
        output.loss = loss + extra

    def _in_loop(self) -> bool:
        """Whether this is a training pass of the loop."""
        return self._optimizer is not None and torch.is_grad_enabled() and not self._own_pass

    def _refuse_outside(self, parameter: Tensor) -> None:
        """Called with each gradient."""
        if self._optimizer is None:
            raise UserError(
                f"training: {self.method.config.name} takes part in training; put the loop into `with "
                f"adapter.training(optimizer, steps=N):`, or give Trainer adapter.callback()"
            )

    def _before_step(
        self,
        steps: int,
        dev: Sequence[Batch],
        steps_per_epoch: int,
        optimizer: torch.optim.Optimizer,
        args: tuple,
        kwargs: dict,
    ) -> None:
        number = self._done + 1
        if isinstance(self.method, AddsLoss) and not self._added:
            raise UserError(
                f"training: the loss lacks {self.method.config.name}'s own term; give the model labels and use its "
                f"loss, or add adapter.extra_loss() to yours"
            )
        self._now = Step(
            number,
            steps,
            self.adapter,
            optimizer.param_groups[0]["lr"],
            partial(self._dev_loss, dev, number),
            _alone,
            epoch=steps_per_epoch,
            tokens=self._tokens / number * steps,
            optimizer=optimizer,
            probe=partial(self._probe, dev),
            log=partial(self._report, number),
            say=_log.info,
        )
        if isinstance(self.method, BeforeStep):
            self.method.before_step(self._now)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._done, self._added = self._done + 1, False
        trained = list(self.adapter.trained.values())
        torch.autograd.graph.increment_version(trained)  # which a fused step does not do
        for parameter in trained:
            parameter.grad = None
        if isinstance(self.method, AfterStep):
            for parameter in trained:
                _forget_graph(parameter)
            self.method.after_step(self._now)

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """Passes inside are the method's own."""
        self._own_pass = True
        try:
            yield
        finally:
            self._own_pass = False

    def _dev_loss(self, dev: Sequence[Batch], step: int, number: int | None = None) -> Tensor:
        """Mean loss of the dev batch that belongs to ``step``, or of a given number from 1, with its graph."""
        with self._passing():
            batch = dev[((number or step) - 1) % len(dev)]
            return self.adapter.model(**_on(batch, self.adapter.model)).loss

    def _probe(self, dev: Sequence[Batch], size: int, tokens: int) -> Probe:
        """The first ``size`` dev examples (all, where there are fewer), padded to one length."""
        rows = [_on(row, self.adapter.model) for row in islice(_rows(dev), size)]
        return Probe({key: _stacked([row[key] for row in rows], key) for key in rows[0]}, tokens)

    @torch.no_grad()
    def _read(self, train: Iterable[Batch], count: int) -> None:
        """One pass over ``count`` training examples, without dropout."""
        model, seen = self.adapter.model, 0
        training = model.training
        model.train(False)
        for batch in train:
            _require_labels(batch, "train")
            batch = {key: value[: count - seen] for key, value in _on(batch, model).items()}
            seen += len(batch["labels"])
            model(**batch)
            if seen == count:
                break
        model.train(training)
        if not seen:
            raise UserError(
                f"train: missing; {self.method.config.name} reads training prompts before the first step, so give "
                f"adapter.training(…, train=BATCHES)"
            )

    def _report(self, step: int, row: dict[str, Any]) -> None:
        self.history.append({"step": step, **row})


def prompt_mask(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The prompts (B, T): shown tokens before the first label of a row that is not -100.

    Raises UserError for a row that begins with its answer.
    """
    mask = (labels != IGNORED).cumsum(dim=1) == 0  # (B, T)
    mask = mask if attention_mask is None else mask & attention_mask.bool()
    if not mask.any(dim=1).all():
        raise UserError(
            "labels: a row has no prompt to route by (labels are -100 on the prompt and the tokens of the answer "
            "behind it); set them so, or give the model prompt_mask"
        )
    return mask


def trainer_callback(training: Training, dev: Iterable[Batch]) -> TrainerCallback:
    """See :meth:`lowrank_cli.api.adapted.Adapter.callback`."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def __init__(self) -> None:
            self.stack = ExitStack()

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if args.n_gpu > 1:
                raise UserError(
                    f"training: Trainer copies the model to {args.n_gpu} GPUs, and adapters would stay on the first; "
                    f"show it one (CUDA_VISIBLE_DEVICES=0)"
                )
            batches = given["train_dataloader"]
            batches = getattr(batches, "base_dataloader", batches)  # without Accelerate's bookkeeping
            epoch = max(1, -(-len(batches) // args.gradient_accumulation_steps)) if isinstance(batches, Sized) else None
            self.stack.close()  # of a training that failed
            self.stack.enter_context(training.running(given["optimizer"], state.max_steps, batches, dev, epoch))

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.stack.close()

    return Callback()


def _processes() -> int:
    """How many train together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _alone(tensor: Tensor) -> Tensor:
    """The mean over one process."""
    return tensor


def _on(batch: Batch, model: PreTrainedModel) -> dict[str, Tensor]:
    """``batch`` on the device of ``model``."""
    return {key: value.to(model.device) for key, value in batch.items()}


def _require_labels(batch: Batch, key: str) -> None:
    if "labels" not in batch or "input_ids" not in batch:
        raise UserError(f"{key}: a batch has {', '.join(batch)}; it needs input_ids and labels")


def _rows(batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """The examples of right-padded ``batches``, each without its padding: (T,) tensors, and a label ()."""
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        if not mask[:, 0].all():
            raise UserError("dev: a batch is padded on the left; pad on the right")
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            yield {key: value[row, :length] if value.dim() == 2 else value[row] for key, value in batch.items()} | {
                "attention_mask": mask[row, :length]
            }


def _stacked(rows: Sequence[Tensor], key: str) -> Tensor:
    """(T,) tensors -> (B, T), padded on the right; numbers -> (B,)."""
    if rows[0].dim() == 0:
        return torch.stack(list(rows))  # (B,)
    longest, fill = max(map(len, rows)), IGNORED if key == "labels" else 0
    return torch.stack([F.pad(row, (0, longest - len(row)), value=fill) for row in rows])  # (B, T)


def _forget_graph(parameter: nn.Parameter) -> None:
    """Let gradients take another shape although a graph of this one is alive, such as that of the loop's ``loss``.

    The graph holds the node that accumulates the gradient, and the next pass would get the same node. Autograd makes
    a new one once the dtype has changed, and the shape alone does not tell it to.
    """
    data = parameter.data
    parameter.data = data.new_empty(0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float32)
    parameter.data = data
