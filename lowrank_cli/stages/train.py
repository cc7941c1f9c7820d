"""``lrk train``: AdamW on the training set, dev evaluation, early stop; the best-dev adapter is kept and tested.

A step is one optimizer update over ``train.batch_size`` examples, however many processes and accumulated batches
share them: its loss is the mean over all its response tokens, so the number of processes changes rounding only.
(A method's own loss term is a mean over prompts of what each batch of each process gives by itself.)
What a step sees is a function of (seed, step), so a killed run continues bit for bit from its last checkpoint.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.training.compiled import compile_layers
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.errors import WorkFailed
from lowrank_cli.icl import calibrate
from lowrank_cli.inference import checkpoint, progress
from lowrank_cli.inference.predict import write_answers
from lowrank_cli.inference.session import Session, start
from lowrank_cli.methods.protocol import (
    AddsLoss,
    AfterStep,
    BeforeStep,
    Calibrates,
    OwnRates,
    Prepares,
    Settles,
    Start,
    Step,
)
from lowrank_cli.runs import Run, atomic_folder, stopping
from lowrank_cli.schema import TrainRun
from lowrank_cli.stages.evaluate import evaluate_split, load_adapter
from lowrank_cli.tasks.batches import WINDOW, Batches, share
from lowrank_cli.tasks.task import template_hash


def run(config: TrainRun, run: Run, *, resume: bool = False) -> dict[str, float]:
    """Train, keep the best adapter in ``run``'s folder, and return its metrics on dev and test.

    A method that calibrates instead of training fits in one pass: it starts again where it was interrupted.

    Raises UserError where the input does not fit, WorkFailed for a loss that is not finite, KeyboardInterrupt after
    a signal to stop, once a checkpoint is written.
    """
    session = start(config)
    if session.foundation is not None:
        load_adapter(session)
    if isinstance(session.method, Calibrates):
        return calibrate.train(session, run)
    return Trainer(session, run).fit(resume)


class Trainer:
    """The loop and its state. ``progress`` is what a checkpoint keeps beside tensors."""

    def __init__(self, session: Session, run: Run):
        assert session.adapter is not None
        self.session, self.run, self.adapter = session, run, session.adapter
        self.config: TrainRun = session.config  # type: ignore[assignment]
        self.settings = self.config.train
        self.accelerator = session.accelerator
        self.train_data = session.encode(session.task.train)
        self.dev_data = session.encode(session.task.dev)
        lengths = [len(example.input_ids) for example in self.train_data]
        window = 1 if self.config.task.parts else WINDOW  # lengths tell the tasks of a mix apart
        self.batches = Batches(lengths, self.settings.batch_size, self.config.seed, window)
        self.dev_batches = Batches(
            [len(example.input_ids) for example in self.dev_data],
            self.settings.batch_size // self.settings.gradient_accumulation,  # no more memory than a training batch
            self.config.seed,
            window,
        )
        self.total = max(1, math.ceil(self.settings.epochs * len(self.batches)))
        if self.settings.max_steps is not None:
            self.total = min(self.total, self.settings.max_steps)
        self.tokens = self.total * self.settings.batch_size * sum(lengths) / len(lengths)  # an early stop reads fewer
        self.adapter.require_declared()
        self.optimizer = torch.optim.AdamW(self._groups(), lr=0.0, weight_decay=self.settings.weight_decay, fused=True)
        hardware = self.config.hardware
        if hardware.compile:
            compile_layers(session.model)
        recompute(session.model, hardware.gradient_checkpointing, hardware.compile)
        self.model = self.accelerator.prepare_model(session.model)
        self.progress: dict[str, Any] = {
            "step": 0,
            "best_step": None,
            "best_loss": None,
            "stale": 0,
            "seconds": 0.0,
            "tokens": 0,
            "pending": [],  # losses since the last line of history.jsonl
            "due": False,  # the evaluation of this step is still to come
        }
        self.bar: progress.Bar  # of the steps, while they run

    def _groups(self) -> list[dict[str, Any]]:
        """What the optimizer steps, by the learning rate at which each tensor's schedule has its ``peak``."""
        method = self.session.method
        own = method.learning_rates(self.adapter) if isinstance(method, OwnRates) else {}
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.adapter.trained.items():
            if name not in self.adapter.deferred:
                groups.setdefault(own.get(name, self.settings.learning_rate), []).append(parameter)
        return [{"params": parameters, "peak": peak} for peak, parameters in groups.items()]

    def fit(self, resume: bool) -> dict[str, float]:
        """Steps until the end or the early stop, then the best adapter's evaluation."""
        self.session.greet(self.run)
        if resume and (folder := checkpoint.newest(self.run)):
            self.progress |= checkpoint.load(
                folder, self.accelerator, self.adapter, self.optimizer, self.session.method
            )
            self._prepare_again()
        if resume:
            # What was logged before the first step comes again too.
            self.run.rewind(self.progress["step"] or -1, evaluated=not self.progress["due"])
        before, began = self.progress["seconds"], time.monotonic()
        start = self.progress["step"]
        first = start + 1 - self.progress["due"]
        with (
            stopping.on_stop(lambda: None),  # a step ends, and its checkpoint is written, before the run stops
            progress.bar("training", self.total, shown=self.accelerator.is_main_process, start=start) as bar,
        ):
            self.bar = bar
            fresh = start == 0 and self.session.foundation is None
            if fresh and isinstance(self.session.method, Prepares):
                log = partial(self._log_at, 0)
                self.session.method.prepare(Start(self.adapter, self._read, self._average, log, bar.say))
            if self.settings.max_steps and self.total < self.settings.max_steps:
                bar.say(f"train.epochs={self.settings.epochs:g} ends after {self.total} steps, before train.max_steps")
            for step in range(first, self.total + 1):
                if self._stale():
                    break
                last = step == self.total
                if step > self.progress["step"]:
                    self.progress["pending"].append(self._step(step))
                    self.progress["step"] = step
                    self.progress["seconds"] = before + time.monotonic() - began
                    if step % self.settings.log_every == 0 or last:
                        bar.note(self._log(step))
                    bar.advance()
                    self.progress["due"] = step % self.settings.eval_every == 0 or last
                stop = self._stopping()
                if self.progress["due"] and not stop:
                    stop = not self._evaluate(step)
                every = self.settings.checkpoint_every
                if stop or (every and (step % every == 0 or last or self._stale())):
                    self._checkpoint()
                if stop:
                    stopping.interrupt()
            if self._stale():
                bar.say(f"no better dev loss in {self.settings.patience} evaluations: stopped early")
        return self._finish()

    @torch.no_grad()
    def _read(self, count: int) -> None:
        """One pass over ``count`` training examples, drawn by the seed, in every process."""
        session, size = self.session, self.config.evaluate.batch_size
        session.model.eval()
        drawn = random.Random(self.config.seed).sample(self.train_data, min(count, len(self.train_data)))
        drawn.sort(key=lambda example: len(example.input_ids))
        with session.autocast(), self.bar.watch("reading prompts", len(drawn)) as tick:
            for at in range(0, len(drawn), size):
                rows = drawn[at : at + size]
                session.loss_sum(session.model, session.batch(rows))
                tick(len(rows))

    def _step(self, step: int) -> float:
        """One optimizer update; returns the mean loss over all its response tokens, as it was before."""
        session, accelerator = self.session, self.accelerator
        self.model.train()
        indices = self.batches[step - 1]
        weight = sum(session.weight(self.train_data[i]) for i in indices)
        self.progress["tokens"] += sum(len(self.train_data[i].input_ids) for i in indices)
        rank, world = accelerator.process_index, accelerator.num_processes
        shares = share(indices, rank, world, self.settings.gradient_accumulation)
        total = torch.zeros((), device=session.device)
        for micro, part in enumerate(shares):
            last = micro == len(shares) - 1
            with nullcontext() if last else accelerator.no_sync(self.model), session.autocast():
                batch = session.batch([self.train_data[i] for i in part.indices])
                loss = session.loss_sum(self.model, batch) * part.counts / weight
                objective = loss * world
                if isinstance(session.method, AddsLoss):
                    share_of_extra = part.counts * len(part.indices) * world / len(indices)
                    objective = objective + session.method.extra_loss(self.adapter) * share_of_extra
            objective.backward()
            total += loss.detach()
            del loss, objective  # their graph would hold the tensors to the shapes that they have now
        mean = accelerator.reduce(total, reduction="sum").item()
        if not math.isfinite(mean):
            raise WorkFailed(
                f"train/loss is {mean} at step {step} (training examples {', '.join(map(str, indices))}); "
                f"try a smaller train.learning_rate, or look at these examples"
            )
        self._update(step)
        return mean

    def _update(self, step: int) -> None:
        """Clip, step, and let the method act before and after."""
        if self.settings.max_grad_norm:
            stepped = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(stepped, self.settings.max_grad_norm)
        rate, method = self.learning_rate(step), self.session.method
        now = Step(
            step,
            self.total,
            self.adapter,
            rate,
            lambda number=step: self._dev_batch_loss(number),
            self._average,
            epoch=len(self.batches),
            tokens=self.tokens,
            optimizer=self.optimizer,
            probe=self.session.probe,
            log=partial(self._log_at, step),
            say=self.bar.say,
            watch=self._watch,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step, group["peak"])
        if isinstance(method, BeforeStep):
            method.before_step(now)
        # the fused AdamW pairs weights, gradients and moments by their places in memory
        assert all(weight.is_contiguous() for weight in self.adapter.trained.values())
        self.optimizer.step()
        torch.autograd.graph.increment_version(self.adapter.trained.values())  # which a fused step does not do
        self.session.model.zero_grad()
        if isinstance(method, AfterStep):
            before = self.adapter.ranks()
            method.after_step(now)
            if self.adapter.ranks() != before:
                self._prepare_again()

    def _prepare_again(self) -> None:
        """Data parallelism holds on to the shapes that it saw first; wrapping anew also makes fresh ranks equal."""
        if self.accelerator.num_processes > 1:
            self.model = self.session.model
            self.accelerator.free_memory()
            self.model = self.accelerator.prepare_model(self.session.model)

    def learning_rate(self, step: int, peak: float | None = None) -> float:
        """Linear warm-up to ``peak`` (None: ``train.learning_rate``) over the first ``warmup`` share of the steps, then
        linear decay to 0."""
        peak = self.settings.learning_rate if peak is None else peak
        warmup = math.ceil(self.settings.warmup * self.total)
        if step <= warmup:
            return peak * step / warmup
        return peak * (self.total + 1 - step) / (self.total + 1 - warmup)

    def _dev_batch_loss(self, step: int) -> Tensor:
        """This process's share of the dev batch that belongs to ``step``: averaged over processes, its mean loss."""
        indices, world = self.dev_batches[step - 1], self.accelerator.num_processes
        weight = sum(self.session.weight(self.dev_data[i]) for i in indices)
        (part,) = share(indices, self.accelerator.process_index, world, 1)
        with self.session.autocast():
            batch = self.session.batch([self.dev_data[i] for i in part.indices])
            return self.session.loss_sum(self.session.model, batch) * part.counts * world / weight

    def _average(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="mean")

    @torch.no_grad()
    def dev_loss(self) -> float | None:
        """Mean loss over all response tokens (causal) or examples (encoder) of the dev set; None on a stop."""
        session, accelerator = self.session, self.accelerator
        session.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=session.device)  # loss, weight
        size = self.config.evaluate.batch_size
        order = sorted(range(len(self.dev_data)), key=lambda i: len(self.dev_data[i].input_ids))
        mine = order[accelerator.process_index :: accelerator.num_processes]
        with session.autocast():
            for at in range(0, len(mine), size):
                if stopping.requested():
                    break
                rows = [self.dev_data[i] for i in mine[at : at + size]]
                sums[0] += session.loss_sum(session.model, session.batch(rows))
                sums[1] += sum(session.weight(row) for row in rows)
        if self._stopping():
            return None
        sums = accelerator.reduce(sums, reduction="sum")
        return (sums[0] / sums[1]).item()

    def _evaluate(self, step: int) -> bool:
        """Dev loss, and the best adapter saved. Returns whether that was done: False on a stop."""
        loss = self.dev_loss()
        if loss is None:
            return False
        self.progress["due"] = False
        method = self.session.method
        unsettled = method.unsettled() if isinstance(method, Settles) else None
        self.run.log({"step": step, "dev/loss": loss} | ({"not_kept": unsettled} if unsettled else {}))
        if not math.isfinite(loss):
            raise WorkFailed(f"dev/loss is {loss} at step {step}; try a smaller train.learning_rate")
        if unsettled:
            self.bar.say(f"step {step}/{self.total}: dev loss {loss:.4f} (not kept: {unsettled})")
            return True
        best = self.progress["best_loss"]
        better = best is None or loss < best
        self.bar.say(f"step {step}/{self.total}: dev loss {loss:.4f}" + (", the best so far" if better else ""))
        if better:
            self.progress.update(best_loss=loss, best_step=step, stale=0)
            self._save_adapter()
        else:
            self.progress["stale"] += 1
        return True

    def _stale(self) -> bool:
        """Whether patience is over."""
        return bool(self.settings.patience) and self.progress["stale"] >= self.settings.patience

    def _save_adapter(self) -> None:
        if self.accelerator.is_main_process:
            about = {
                "task": self.session.task.name,
                "template_hash": self.session.task.template_hash,
                "parts": {part.name: template_hash(part) for part in self.config.task.parts.values()},
                "method": self.config.method.name,
                "model": self.config.model.name,
                "step": self.progress["step"],
            }
            with atomic_folder(self.run.file("adapter")) as folder:
                save_load.save(self.adapter, folder, about)
        self.accelerator.wait_for_everyone()

    def _checkpoint(self) -> None:
        checkpoint.save(self.run, self.accelerator, self.adapter, self.optimizer, self.session.method, self.progress)

    def _log_at(self, step: int, row: dict[str, Any]) -> None:
        self.run.log({"step": step, **row})

    def _log(self, step: int) -> str:
        """A line of history.jsonl, and the same in short for the bar."""
        done = self.progress
        loss = sum(done["pending"]) / len(done["pending"])
        done["pending"] = []
        row = {
            "step": step,
            "train/loss": loss,
            "learning_rate": self.learning_rate(step),
            "train/seconds": round(done["seconds"], 3),
            "train/tokens": done["tokens"],
        }
        self.run.log(row)
        at, best = done["best_step"], done["best_loss"]
        return f"loss {loss:.3f}" + ("" if at is None else f", best dev {best:.3f} at {at}")

    def _finish(self) -> dict[str, float]:
        """Evaluate the best adapter on dev and test and collect the run's metrics."""
        session, done = self.session, self.progress
        save_load.load(self.adapter, self.run.path / "adapter")
        metrics: dict[str, float] = {
            "train/steps": done["step"],
            "train/seconds": done["seconds"],
            "train/tokens_per_second": done["tokens"] / max(done["seconds"], 1e-9),
            "best_step": done["best_step"],
            "dev/loss": done["best_loss"],
        }
        metrics.update(evaluate_split(session, "dev")[0])
        found, records, observed = evaluate_split(session, "test")
        metrics.update(found)
        write_answers(self.run, records, observed.figures)
        session.note_device(self.run)
        if self.accelerator.is_main_process:
            observed.tell()
        return {**metrics, **observed.metrics}

    def _stopping(self) -> bool:
        """Whether any process was asked to stop; every process gets the same answer."""
        if self.accelerator.num_processes == 1:
            return stopping.requested()
        flag = torch.tensor(float(stopping.requested()), device=self.session.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    @contextmanager
    def _watch(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A second bar for something slow within a step, such as scoring.

        A stop does not wait for it where the run has checkpoints of its own: it continues from the last of these.
        """

        def tick(count: int) -> None:
            stopping.check()
            advance(count)

        at_once = stopping.on_stop(stopping.interrupt) if self.settings.checkpoint_every else nullcontext()
        with self.bar.watch(description, total) as advance, at_once:
            yield tick
