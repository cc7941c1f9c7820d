"""The engine: a queue of requests, and one thread that answers them, many at a time.

    engine = Engine(model, tokenizer, "base", max_rows=16, max_waiting=256, max_length=1024)
    engine.load("ann", folder)
    engine.submit([Request(engine.model("ann"), ids, Sampling(max_tokens=16), listener)])
    engine.close()

All methods may be called from any thread.
"""

from __future__ import annotations

import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Condition, Thread
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_cli.errors import UserError, escaped, nearest
from lowrank_cli.serving.adapters import Adapters
from lowrank_cli.serving.lanes import Lane
from lowrank_cli.serving.requests import Failed, Model, Request

T = TypeVar("T")
PROMPT_TOKENS = 4096  #: tokens of prompts that are read before running answers go on


class Full(Exception):
    """Too many answers wait already."""


class Closing(Exception):
    """The engine takes no more requests."""


class UnknownModel(UserError):
    """There is no model of this name."""


class Engine:
    """Answers requests for one model and its adapters.

    Args:
        model: the bare model, in evaluation mode. Until the engine is closed, nobody else may use it.
        base: its name.
        max_rows: answers generated at a time.
        max_waiting: answers that may wait for that.
        max_length: tokens of a prompt and its answer.
        max_bytes, grouped: as of :class:`~lowrank_cli.adapter.tenants.bank.Bank`.
        autocast: compute in bf16.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        base: str,
        *,
        max_rows: int,
        max_waiting: int,
        max_length: int,
        max_bytes: int | None = None,
        grouped: str | None = None,
        autocast: bool = False,
    ):
        self.tokenizer = tokenizer
        self.max_rows, self.max_waiting, self.max_length = max_rows, max_waiting, max_length
        self.adapters = Adapters(model, tokenizer, max_bytes, grouped, autocast)
        self.base = Model(base)
        self._changed = Condition()  # guards what follows
        self.lanes: dict[Model, Lane] = {self.base: self.adapters.bank_lane}  # of all models, unloaded ones too
        self._models = {base: self.base}
        self._waiting: deque[Request] = deque()
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._closing = self._closed = False
        self._idle = True  # whether the thread waits for work
        self._thread = Thread(target=self._run, args=(torch.get_num_threads(),), name="engine", daemon=True)
        self._thread.start()

    @property
    def models(self) -> list[Model]:
        """All models, the bare one first."""
        with self._changed:
            return list(self._models.values())

    @property
    def running(self) -> int:
        """Answers that are being generated."""
        return sum(len(lane.answers) for lane in set(self.lanes.copy().values()))

    @property
    def waiting(self) -> int:
        """Answers that wait for that."""
        with self._changed:
            return sum(request.count for request in self._waiting)

    @property
    def closing(self) -> bool:
        """Whether new requests are refused."""
        return self._closing

    def model(self, name: str) -> Model:
        """The model of this name. Raises UnknownModel."""
        with self._changed:
            if name not in self._models:
                raise UnknownModel(f"model: there is no model '{name}'{nearest(name, self._models)}")
            return self._models[name]

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue ``requests``, all or none.

        Raises:
            UnknownModel: a model has been unloaded.
            Full: the queue is.
            Closing: the engine is being closed.
        """
        with self._changed:
            if self._closing:
                raise Closing
            for request in requests:
                assert request.count <= self.max_rows
                if self._models.get(request.model.name) is not request.model:
                    raise UnknownModel(f"model: there is no model '{request.model.name}'")
            waiting = [*(request for request in self._waiting if not request.cancelled), *requests]
            if sum(request.count for request in waiting) > self.max_waiting:
                raise Full
            self._waiting = deque(waiting)
            self._changed.notify_all()

    def load(self, name: str, folder: str) -> Model:
        """Serve the adapter of a run or of an adapter folder as ``name``; running answers pause meanwhile.

        Raises:
            UserError: the name is taken, there is no adapter, or it does not fit the model.
        """

        def load() -> Model:
            with self._changed:
                if name in self._models:
                    raise UserError(f"model: there is a model '{name}' already; unload it first")
            model, lane = self.adapters.load(name, folder)
            with self._changed:
                self._models[name], self.lanes[model] = model, lane
            return model

        return self.between_steps(load)

    def unload(self, name: str) -> None:
        """Serve ``name`` no longer; requests that are queued or running are still answered.

        Raises:
            UserError: an unknown name, or that of the bare model.
        """
        model = self.model(name)
        if model is self.base:
            raise UserError(f"model: '{name}' is the model that all adapters share; it cannot be unloaded")
        with self._changed:
            self._models.pop(name, None)
            self._changed.notify_all()

    def close(self, seconds: float | None = 0) -> None:
        """Refuse new requests, finish the others within ``seconds`` (None: without a limit), and fail what is left."""
        self.refuse()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._idle and not self._waiting), seconds)
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def refuse(self) -> None:
        """Refuse new requests from now on."""
        self._closing = True

    def between_steps(self, work: Callable[[], T]) -> T:
        """The result of ``work``, done by the engine's thread between two steps. Raises Closing if it has ended."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise Closing
            self._jobs.append((future, work))
            self._changed.notify_all()
        return future.result()

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            while self._wait_for_work():
                self._do_jobs()
                self._forget_unloaded()
                self._step()
        finally:  # whatever happens, nobody waits for ever
            with self._changed:
                self._closing = self._closed = self._idle = True
                self._changed.notify_all()
            stopped = Failed("the server was stopped")
            for lane in self._all_lanes():
                lane.fail(stopped)
            for request in self._waiting:
                request.fail(stopped)
            for future, _ in self._jobs:
                future.set_exception(Closing())

    def _step(self) -> None:
        """Start what fits, and generate one token of each running answer."""
        for lane, requests in self._admitted():
            self._start(lane, requests)
        for lane in self._all_lanes():
            with _failing(lane):
                lane.step()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do. Returns False once the engine is closed."""
        with self._changed:
            if not self._has_work():
                self._idle = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._has_work())
            self._idle = False
            return not self._closed

    def _has_work(self) -> bool:
        return bool(self._jobs or self._waiting or self.running or len(self.lanes) > len(self._models))

    def _do_jobs(self) -> None:
        with self._changed:
            jobs = [self._jobs.popleft() for _ in range(len(self._jobs))]
        if jobs:
            self.adapters.bank_lane.suspend()
        for future, work in jobs:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

    def _all_lanes(self) -> list[Lane]:
        return list(dict.fromkeys(self.lanes.values()))

    def _forget_unloaded(self) -> None:
        """Remove the adapters of unloaded models whose answers are done."""
        with self._changed:
            used = {request.model for request in self._waiting}
            used |= {answer.request.model for lane in self._all_lanes() for answer in lane.answers}
            unused = [model for model in self.lanes if model not in used and model not in self._models.values()]
            for model in unused:
                del self.lanes[model]
        for model in unused:
            self.adapters.remove(model)

    def _admitted(self) -> Iterator[tuple[Lane, list[Request]]]:
        """Take requests off the queue, in order, as long as there are rows for them; by lane."""
        lanes: dict[Lane, list[Request]] = {}
        rows, tokens = self.max_rows - self.running, 0
        with self._changed:
            while self._waiting:
                request = self._waiting[0]
                if request.cancelled:
                    self._waiting.popleft()
                    continue
                lane = self.lanes[request.model]
                joining = [*lanes.get(lane, ()), request]
                tokens += len(request.prompt)
                if request.count > rows or (lanes and tokens > PROMPT_TOKENS):
                    break
                if not lane.fits(joining) and (lane.answers or lane in lanes):
                    break  # alone it may fit; if it does not, its failure says why
                lanes[lane] = joining
                rows -= request.count
                self._waiting.popleft()
        yield from lanes.items()

    def _start(self, lane: Lane, requests: Sequence[Request]) -> None:
        """Start requests. If their prompts cannot be read together, one by one."""
        try:
            read = lane.read(requests)
        except Exception as error:
            if len(requests) == 1:
                requests[0].fail(_failure(error))
            else:
                for request in requests:
                    self._start(lane, [request])
            return
        with _failing(lane, requests):
            lane.join(requests, read)


@contextmanager
def _failing(lane: Lane, starting: Sequence[Request] = ()) -> Iterator[None]:
    """Inside, an error ends the answers of ``lane`` and of requests that it starts, and no others."""
    try:
        yield
    except Exception as error:
        failed = _failure(error)
        lane.fail(failed)
        for request in starting:
            request.fail(failed)


def _failure(error: Exception) -> Failed:
    """What a client is told of ``error``. An error that is not the user's goes to stderr too."""
    if isinstance(error, UserError):
        return Failed(str(error))
    print(escaped("".join(traceback.format_exception(error))), file=sys.stderr)
    return Failed(f"the model failed ({type(error).__name__}); the server's log says more")
