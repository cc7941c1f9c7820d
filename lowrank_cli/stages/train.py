"""``lrk train``: steps with dev evaluation and early stopping; the adapter with the best dev loss is kept and tested.

A step is one optimizer update over ``train.batch_size`` examples, split among processes and accumulated batches. Its
loss is the mean over all its response tokens, so the number of processes changes only rounding. (A method's extra loss
term is computed for each micro-batch and averaged over prompts.)
The data of a step depend on (seed, step) alone, so a killed run resumes bit for bit from its last checkpoint.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.training.compiled import compile_layers
from lowrank_cli.adapter.training.packing import pack
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.errors import Diverged
from lowrank_cli.icl import calibrate
from lowrank_cli.inference.predict import write_answers
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
from lowrank_cli.runs import Run, atomic_folder, progress, stopping
from lowrank_cli.schema import TrainRun
from lowrank_cli.schema.learning_rate import usual_rate
from lowrank_cli.session import number_head, optimizers
from lowrank_cli.session.session import Session, load_adapter, start
from lowrank_cli.stages.evaluate import evaluate_end
from lowrank_cli.tasks.batches import WINDOW, Batches, padding, share
from lowrank_cli.tasks.task import template_hash
from lowrank_cli.training import checkpoint, tracking


def run(config: TrainRun, run: Run, adapter_run: Path | None, *, resume: bool = False) -> dict[str, float]:
    """Train, keep the best adapter in ``run``'s folder, and return its metrics on dev and test.

    A method that calibrates instead of training fits in one pass and starts over when resumed.

    Raises:
        UserError: the input does not fit.
        Diverged: a loss is not finite.
        KeyboardInterrupt: a signal asked to stop; a checkpoint is written first.
    """
    session = start(config, adapter_run)
    if session.adapter_run is not None:
        load_adapter(session)
    work: Callable[[], dict[str, float]]
    if isinstance(session.method, Calibrates):
        step, work = 0, partial(calibrate.train, session, run, config.test)
    else:
        trainer = Trainer(session, run)
        session.greet(run, *trainer.remarks())
        if resume:
            trainer.resume()
        step, work = trainer.progress["step"], trainer.fit
    with tracking.tracked(run, config.tracker, step) as track_final:
        metrics = work()
        track_final(metrics)
    return metrics


class Trainer:
    """The training loop and its state. ``progress`` is the state that is not tensors, as checkpoints save it."""

    def __init__(self, session: Session, run: Run):
        assert session.adapter is not None
        self.session, self.run, self.adapter = session, run, session.adapter
        self.config: TrainRun = session.config  # type: ignore[assignment]
        self.settings = self.config.train
        assert self.settings.learning_rate is not None, "composition fills it in"
        self.peak = self.settings.learning_rate
        self.accelerator = session.accelerator
        self.train_data = session.encode(session.task.train)
        self.dev_data = session.encode(session.task.dev)
        self.lengths = lengths = [example.length for example in self.train_data]
        window = 1 if self.config.task.parts else WINDOW  # sorting by length would separate the tasks of a mix
        self.padded_batches = Batches(lengths, self.settings.batch_size, self.config.seed, window)
        self.batches = self.padded_batches
        if self.settings.packing:
            self.batches = Batches(lengths, self.settings.batch_size, self.config.seed, 1)
            with self.adapter.disabled(), session.autocast():
                pack(session.model)
        self.dev_batches = Batches(
            [example.length for example in self.dev_data],
            self.settings.batch_size // self.settings.gradient_accumulation,  # no more memory than a training batch
            self.config.seed,
            window,
        )
        self.total = max(1, math.ceil(self.settings.epochs * len(self.batches)))
        if self.settings.max_steps is not None:
            self.total = min(self.total, self.settings.max_steps)
        self.tokens = self.total * self.settings.batch_size * sum(lengths) / len(lengths)  # fewer if stopped early
        self.adapter.require_declared()
        method = session.method
        rates = method.learning_rates(self.adapter, self.peak) if isinstance(method, OwnRates) else {}
        if self.config.task.answer == "number":
            rates |= number_head.rates(self.adapter, self._numbers(), self.peak)
        self.optimizer = optimizers.create(self.settings, self.adapter, rates)
        hardware = self.config.hardware
        if hardware.compile:
            compile_layers(session.model)
        recompute(session.model, hardware.gradient_checkpointing, hardware.compile)
        self._take_from_first()
        self.progress: dict[str, Any] = {
            "step": 0,
            "best_step": None,
            "best_loss": None,
            "stale": 0,
            "seconds": 0.0,
            "tokens": 0,
            "pending": [],  # losses since the last line of history.jsonl
            "due": False,  # this step still has to be evaluated
        }
        self.bar: progress.Bar  # of the steps, while they run

    def _numbers(self) -> list[float]:
        """The right answers of the training set, where they are numbers."""
        return [example.target for example in self.session.task.train if isinstance(example.target, float)]

    def remarks(self) -> list[str]:
        """A line about the learning rate, if it was chosen by the table, or is far from it, and one about packing."""
        width = self.session.width
        usual = usual_rate(self.config.model, width, self.session.method.rate_scale())
        noted = usual.is_usual(self.peak) or usual.is_far(self.peak)
        lines = [f"learning rate: {usual.described(self.peak)}"] if noted else []
        if self.settings.packing:
            saved = self._padding(self.total)
            lines.append(f"packing: no padding, which would be {saved:.0%} of the positions in batches")
        return lines

    def _padding(self, steps: int) -> float:
        """The share of padding, without packing, in the first ``steps`` batches (of the first epoch)."""
        world, accumulated = self.accelerator.num_processes, self.settings.gradient_accumulation
        return padding(self.lengths, self.padded_batches, min(steps, len(self.batches)), world, accumulated)

    def fit(self) -> dict[str, float]:
        """Train until the last step or an early stop, then evaluate the best adapter."""
        start = self.progress["step"]
        began = time.monotonic() - self.progress["seconds"]
        with (
            stopping.on_stop(lambda: None),  # the current step ends and is saved before the run stops
            progress.bar("training", self.total, shown=self.accelerator.is_main_process, start=start) as bar,
        ):
            self.bar = bar
            fresh = start == 0 and self.session.adapter_run is None
            if fresh and self.config.task.answer == "number":
                number_head.start_from(self.adapter, self._numbers())
            if fresh and isinstance(self.session.method, Prepares):
                log = partial(self._log_at, 0)
                self.session.method.prepare(Start(self.adapter, self._read, self._average, log, bar.say))
                self._take_from_first()  # singular vectors may differ between machines
            if self.settings.max_steps and self.total < self.settings.max_steps:
                bar.say(f"train.epochs={self.settings.epochs:g} ends after {self.total} steps, before train.max_steps")
            if self.settings.eval_first and start == 0 and not self._evaluate(0):
                stopping.interrupt()
            self._loop(began)
            if self._stale():
                bar.say(f"no better dev loss in {self.settings.patience} evaluations: stopped early")
        return self._finish()

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one, and drop the history after it."""
        if folder := checkpoint.newest(self.run):
            self.progress |= checkpoint.load(
                folder, self.accelerator, self.adapter, self.optimizer, self.session.method
            )
        # without a checkpoint, lines that were logged before the first step are logged again too
        self.run.rewind(self.progress["step"] or -1, evaluated=not self.progress["due"])

    def _loop(self, began: float) -> None:
        """Run the remaining steps, evaluating and saving when due. ``began``: s, without the time between resumes."""
        first = self.progress["step"] + 1 - self.progress["due"]
        for step in range(first, self.total + 1):
            if self._stale():
                break
            last = step == self.total
            if step > self.progress["step"]:
                self.progress["pending"].append(self.take_step(step))
                self.progress["step"] = step
                self.progress["seconds"] = time.monotonic() - began
                if step % self.settings.log_every == 0 or last:
                    self.bar.note(self._log(step))
                self.bar.advance()
                self.progress["due"] = step % self.settings.eval_every == 0 or last
            stop = self._stopping()
            if self.progress["due"] and not stop:
                stop = not self._evaluate(step)
            every = self.settings.checkpoint_every
            if stop or (every and (step % every == 0 or last or self._stale())):
                self._checkpoint()
            if stop:
                stopping.interrupt()

    @torch.no_grad()
    def _read(self, count: int) -> None:
        """A forward pass over ``count`` training examples drawn with the seed, the same in every process."""
        session, size = self.session, self.config.evaluate.batch_size
        session.model.eval()
        drawn = random.Random(self.config.seed).sample(self.train_data, min(count, len(self.train_data)))
        drawn.sort(key=lambda example: example.length)
        with session.autocast(), self.bar.watch("reading prompts", len(drawn)) as tick:
            for at in range(0, len(drawn), size):
                rows = drawn[at : at + size]
                session.loss_sum(session.model, session.batch(rows))
                tick(len(rows))

    def take_step(self, step: int) -> float:
        """One optimizer update. Returns the mean loss over all its response tokens, before the update."""
        session, accelerator = self.session, self.accelerator
        session.model.train()
        indices = self.batches[step - 1]
        weight = sum(session.weight(self.train_data[i]) for i in indices)
        self.progress["tokens"] += sum(self.train_data[i].length for i in indices)
        world, accumulated = accelerator.num_processes, self.settings.gradient_accumulation
        shares = [share(indices, rank, world, accumulated) for rank in range(world)]
        collate = session.packed if self.settings.packing else session.batch
        total = torch.zeros((), device=session.device)
        for micros in zip(*shares, strict=True):  # one for each process
            micro = micros[accelerator.process_index]
            with session.autocast():
                batch = collate([self.train_data[i] for i in micro.indices])
                objective = loss = session.loss_sum(session.model, batch) * micro.counts / weight
                if isinstance(session.method, AddsLoss):
                    examples = sum(micro.counts * len(micro.indices) for micro in micros)
                    scale = examples / len(indices) / world
                    objective = loss + session.method.extra_loss(self.adapter, self._average) * scale
            objective.backward()
            total += loss.detach()
            del loss, objective  # a live graph would keep parameters from being resized
        mean = accelerator.reduce(total, reduction="sum").item()
        if not math.isfinite(mean):
            raise Diverged(
                f"train/loss is {mean} at step {step} (training examples {', '.join(map(str, indices))}); "
                f"try a smaller train.learning_rate, or look at these examples"
            )
        accelerator.add_up_gradients(self._stepped())
        self.update(step)
        return mean

    def _stepped(self) -> list[Parameter]:
        """The parameters that the optimizer steps."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def update(self, step: int) -> None:
        """Clip gradients and step the optimizer, with the method's hooks before and after."""
        if self.settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._stepped(), self.settings.max_grad_norm)
        rate, method = self.learning_rate(step), self.session.method
        now = Step(
            step,
            self.total,
            self.adapter,
            rate,
            lambda number=step: self.dev_batch_loss(number),
            self._average,
            epoch=len(self.batches),
            tokens=self.tokens,
            optimizer=self.optimizer,
            probe=self.session.probe,
            log=partial(self._log_at, step),
            say=self.bar.say,
            watch=self.watch,
            agree=self._take_from_first,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step, group["peak"])
        if isinstance(method, BeforeStep):
            method.before_step(now)
        # fused AdamW pairs weights, gradients and moments by their order in memory
        assert all(weight.is_contiguous() for weight in self.adapter.trained.values())
        self.optimizer.step()
        torch.autograd.graph.increment_version(self.adapter.trained.values())  # fused and 8-bit steps do not
        self.session.model.zero_grad()
        if isinstance(method, AfterStep):
            before = self.adapter.ranks()
            method.after_step(now)
            if self.adapter.ranks() != before:
                self._take_from_first()

    def _take_from_first(self) -> None:
        """Give all processes the adapter of the first: fresh tensors are random."""
        self.accelerator.take_from_first(save_load.named(self.adapter).values())

    def learning_rate(self, step: int, peak: float | None = None) -> float:
        """That of ``step``; ``peak`` defaults to ``train.learning_rate``."""
        return (self.peak if peak is None else peak) * optimizers.share_of_peak(self.settings, step, self.total)

    def dev_batch_loss(self, step: int) -> Tensor:
        """This process's share of the mean loss of ``step``'s dev batch: the mean over processes is that loss."""
        indices, world = self.dev_batches[step - 1], self.accelerator.num_processes
        weight = sum(self.session.weight(self.dev_data[i]) for i in indices)
        (mine,) = share(indices, self.accelerator.process_index, world, 1)
        with self.session.autocast():
            batch = self.session.batch([self.dev_data[i] for i in mine.indices])
            return self.session.loss_sum(self.session.model, batch) * mine.counts * world / weight

    def _average(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="mean")

    @torch.no_grad()
    def dev_loss(self) -> float | None:
        """Mean loss over all response tokens (causal) or examples (encoder) of the dev set; None if asked to stop."""
        session, accelerator = self.session, self.accelerator
        session.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=session.device)  # loss, weight
        size = self.config.evaluate.batch_size
        order = sorted(range(len(self.dev_data)), key=lambda i: self.dev_data[i].length)
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
        """Compute the dev loss and save the adapter if it is the best. Returns False if asked to stop meanwhile."""
        with optimizers.evaluated_weights(self.optimizer):
            return self._evaluate_weights(step)

    def _evaluate_weights(self, step: int) -> bool:
        loss = self.dev_loss()
        if loss is None:
            return False
        self.progress["due"] = False
        method = self.session.method
        unsettled = method.unsettled() if isinstance(method, Settles) else None
        self.run.log({"step": step, "dev/loss": loss} | ({"not_kept": unsettled} if unsettled else {}))
        if not math.isfinite(loss):
            raise Diverged(f"dev/loss is {loss} at step {step}; try a smaller train.learning_rate")
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
        """Whether the dev loss has not improved in ``train.patience`` evaluations."""
        return bool(self.settings.patience) and self.progress["stale"] >= self.settings.patience

    def _save_adapter(self) -> None:
        if self.accelerator.is_main_process:
            about = {
                "task": self.session.task.name,
                "template_hash": self.session.task.template_hash,
                "parts": {task.name: template_hash(task) for task in self.config.task.parts.values()},
                "method": self.config.method.name,
                "model": self.config.model.name,
                "step": self.progress["step"],
                **({"chat": hashes} if (hashes := self.session.chat_hashes) else {}),
            }
            with atomic_folder(self.run.file("adapter")) as folder:
                save_load.save(self.adapter, folder, about)
        self.accelerator.wait_for_everyone()

    def _checkpoint(self) -> None:
        checkpoint.save(self.run, self.accelerator, self.adapter, self.optimizer, self.session.method, self.progress)

    def _log_at(self, step: int, row: dict[str, Any]) -> None:
        self.run.log({"step": step, **row})

    def _log(self, step: int) -> str:
        """Write a line to history.jsonl; returns a short form of it for the bar."""
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
        """Evaluate the best adapter on dev and, unless ``test=false``, on test. Returns the run's metrics."""
        session, done = self.session, self.progress
        save_load.load(self.adapter, self.run.path / "adapter")
        metrics: dict[str, float] = {
            "train/steps": done["step"],
            "train/epochs": round(done["step"] / len(self.batches), 4),
            "train/seconds": done["seconds"],
            "train/tokens_per_second": done["tokens"] / max(done["seconds"], 1e-9),
            "train/padding": 0.0 if self.settings.packing else self._padding(done["step"]),
            "best_step": done["best_step"],
            "dev/loss": done["best_loss"],
        }
        measured, records, observed = evaluate_end(session, self.config.test)
        metrics.update(measured)
        write_answers(self.run, records, observed.figures)
        session.note_device(self.run)
        if self.accelerator.is_main_process:
            observed.print_doubts()
        return {**metrics, **observed.metrics}

    def _stopping(self) -> bool:
        """Whether any process was asked to stop; the same in every process."""
        if self.accelerator.num_processes == 1:
            return stopping.requested()
        flag = torch.tensor(float(stopping.requested()), device=self.session.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    @contextmanager
    def watch(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A second bar for something slow within a step, such as scoring.

        If the run writes checkpoints, a stop interrupts it at once, and the run resumes from the last checkpoint.
        """

        def tick(count: int) -> None:
            stopping.check()
            advance(count)

        at_once = stopping.on_stop(stopping.interrupt) if self.settings.checkpoint_every else nullcontext()
        with self.bar.watch(description, total) as advance, at_once:
            yield tick
