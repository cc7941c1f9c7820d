"""Runs a method inside a user's training loop, by hooks on the model and the optimizer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.lm_head import IGNORED
from lowrank_cli.api.batches import Batch, examples, on_device, padded, prompt_mask, require_labels
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

_log = logging.getLogger("lowrank_cli")


class Training:
    """Lets ``method`` take part in training ``adapter``; ``fresh``: neither loaded nor trained before."""

    def __init__(self, adapter: Adapter, method: Method, fresh: bool):
        self.adapter, self.method, self.fresh = adapter, method, fresh
        self.history: list[dict[str, Any]] = []
        self._optimizer: torch.optim.Optimizer | None = None  # set while a training runs
        self._in_method = False  # whether a pass belongs to the method, not to the loop
        self._added = False  # whether the loss of this step includes the method's term
        self._now: Step  # the current step
        self._done = 0  # steps done
        self._tokens = 0  # tokens read by the loop so far
        adapter.model.register_forward_pre_hook(self._before_pass, with_kwargs=True, prepend=True)
        adapter.model.register_forward_hook(self._after_pass, with_kwargs=True)
        for parameter in adapter.trained.values() if self._acts_in_training() else ():
            parameter.register_post_accumulate_grad_hook(self._refuse_outside)

    def stepped(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer steps, by name."""
        return {name: p for name, p in self.adapter.trained.items() if name not in self.adapter.deferred}

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
        optimizer = getattr(optimizer, "optimizer", optimizer)  # unwrap Accelerate's
        dev = list(dev)
        self._check(optimizer, steps, dev)
        if steps_per_epoch is None:
            steps_per_epoch = (len(train) if isinstance(train, Sized) else 0) or steps
        if self.fresh and isinstance(self.method, Prepares):
            log = partial(self._report, 0)
            self.method.prepare(Start(self.adapter, partial(self._read, train), _single_process_mean, log, _log.info))
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
        """Raise UserError if the method could not train correctly."""
        method, name = self.method, self.method.config.name
        require_range("steps", steps, 1)
        if self._optimizer is not None:
            raise UserError("training: one runs already on this adapter")
        if self._acts_in_training() and _processes() > 1:
            raise UserError(f"training: {name} acts between steps, here in one process only; use lrk train for several")
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        group_of = {key: groups[id(p)] for key, p in self.adapter.trained.items() if id(p) in groups}
        hint = "make it of adapter.parameter_groups(LEARNING_RATE)"
        if missing := self.stepped().keys() - group_of.keys():
            raise UserError(f"optimizer: it lacks {len(missing)} of the trained tensors ('{min(missing)}'); {hint}")
        if surplus := group_of.keys() & self.adapter.deferred:
            raise UserError(f"optimizer: it holds '{min(surplus)}', which {name} steps itself; {hint}")
        self._check_rates(group_of, hint)
        if method.needs_adam() and not isinstance(optimizer, torch.optim.Adam):
            raise UserError(f"optimizer: {type(optimizer).__name__} does not go with {name}; use torch.optim.AdamW")
        if (use := method.dev_use()) and not dev:
            raise UserError(f"dev: missing; {name} {use}, so give adapter.training(…, dev=BATCHES)")
        for batch in dev:
            require_labels(batch, "dev")

    def _check_rates(self, group_of: dict[str, dict[str, Any]], hint: str) -> None:
        """Raise UserError if a tensor lacks the learning rate that the method gives it; ``group_of``: its group."""
        if not isinstance(self.method, OwnRates):
            return
        rate_of = {tensor: group.get("initial_lr", group["lr"]) for tensor, group in group_of.items()}
        own = self.method.learning_rates(self.adapter, 1.0)
        peak = next((rate for tensor, rate in rate_of.items() if tensor not in own), 0.0)
        for tensor, rate in self.method.learning_rates(self.adapter, peak).items() if peak else ():
            if (actual := rate_of[tensor]) != rate:
                name = self.method.config.name
                raise UserError(f"optimizer: '{tensor}' has the learning rate {actual}, {name} says {rate}; {hint}")

    def _acts_in_training(self) -> bool:
        """Whether a loop needs :meth:`running`."""
        return isinstance(self.method, BeforeStep | AfterStep | AddsLoss | Prepares)

    def _check_end(self, steps: int) -> None:
        """Warn about what was not done."""
        name = self.method.config.name
        if self._done == 0:
            raise UserError("training: no step was taken with this optimizer")
        reason = self.method.unsettled() if isinstance(self.method, Settles) else None
        if reason or (self._acts_in_training() and self._done != steps):
            warnings.warn(
                f"{name}: {self._done} of {steps} steps were taken{f'; {reason}' if reason else ''}", stacklevel=6
            )

    def _before_pass(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Count tokens, and pass the prompt mask to routers."""
        labels = kwargs.get("labels")
        if self._in_loop():
            inputs = [*args, *(kwargs.get(key) for key in ("input_ids", "inputs_embeds"))]
            self._tokens += next((x.shape[0] * x.shape[1] for x in inputs if x is not None), 0)
        if self.adapter.routing and labels is not None and labels.dim() == 2 and kwargs.get("prompt_mask") is None:
            kwargs["prompt_mask"] = prompt_mask(labels, kwargs.get("attention_mask"))
        return args, kwargs

    def _after_pass(self, model: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> None:
        """Add the method's term to the loss of a training pass.

        With gradient accumulation Trainer divides the loss by all answer tokens of a step; the term is then weighted by
        the batch's share of them.
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
        """Whether this pass is a training pass of the loop."""
        return self._optimizer is not None and torch.is_grad_enabled() and not self._in_method

    def _refuse_outside(self, parameter: Tensor) -> None:
        """Raise UserError if a gradient is computed outside of :meth:`running`."""
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
            _single_process_mean,
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
        torch.autograd.graph.increment_version(trained)  # fused optimizers do not
        for parameter in trained:
            parameter.grad = None
        if isinstance(self.method, AfterStep):
            for parameter in trained:
                _drop_graph(parameter)
            self.method.after_step(self._now)

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """Mark passes inside as the method's own."""
        self._in_method = True
        try:
            yield
        finally:
            self._in_method = False

    def _dev_loss(self, dev: Sequence[Batch], step: int, number: int | None = None) -> Tensor:
        """Mean loss, with its graph, of the dev batch of ``step``, or of the one with ``number`` (from 1)."""
        with self._passing():
            batch = dev[((number or step) - 1) % len(dev)]
            return self.adapter.model(**on_device(batch, self.adapter.model)).loss

    def _probe(self, dev: Sequence[Batch], size: int, tokens: int) -> Probe:
        """The first ``size`` dev examples, or all if there are fewer, padded to one length."""
        rows = [on_device(row, self.adapter.model) for row in islice(examples(dev), size)]
        return Probe({key: padded([row[key] for row in rows], key) for key in rows[0]}, tokens)

    @torch.no_grad()
    def _read(self, train: Iterable[Batch], count: int) -> None:
        """One pass over ``count`` training examples, without dropout."""
        model, seen = self.adapter.model, 0
        training = model.training
        model.train(False)
        for batch in train:
            require_labels(batch, "train")
            batch = {key: value[: count - seen] for key, value in on_device(batch, model).items()}
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
            batches = getattr(batches, "base_dataloader", batches)  # unwrap Accelerate's
            epoch = max(1, -(-len(batches) // args.gradient_accumulation_steps)) if isinstance(batches, Sized) else None
            self.stack.close()  # after a failed training
            self.stack.enter_context(training.running(given["optimizer"], state.max_steps, batches, dev, epoch))

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.stack.close()

    return Callback()


def _processes() -> int:
    """The number of processes that train together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _single_process_mean(tensor: Tensor) -> Tensor:
    """The mean over one process."""
    return tensor


def _drop_graph(parameter: nn.Parameter) -> None:
    """Let the parameter change its shape while an old graph is alive, such as that of the loop's ``loss``.

    The graph holds the node that accumulates the gradient, which the next pass would reuse. Autograd creates a new one
    when the dtype changes, but not when only the shape does.
    """
    data = parameter.data
    parameter.data = data.new_empty(0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float32)
    parameter.data = data
