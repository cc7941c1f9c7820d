"""Ctrl-C, SIGTERM (Slurm, ``timeout``, containers) and SIGUSR1 (``sbatch --signal``): one way to stop.

The first signal raises :class:`Stop` in the main thread, or calls the handler of :func:`on_stop`: a training loop
finishes its step and saves first. Libraries may swallow the exception, so loops also call :func:`check`. A second
Ctrl-C or SIGTERM always raises. A repeated SIGUSR1 never does, so processes use it to pass a stop on to each other.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL = 0.5  # s between checks of another process
DEBOUNCE = 0.5  # s: signals this close count as one (`timeout` signals the process and then its group)


class Stop(KeyboardInterrupt):
    """A signal asked to stop.

    A subclass, because CPython kills the process with SIGINT if ``exec`` saw a plain KeyboardInterrupt, even one that
    was caught.
    """


_number: int | None = None  #: the first signal
_handler: int | None = None  #: the process that is inside :func:`signals`
_since = 0.0  #: when it arrived, in s of the monotonic clock


def interrupt() -> None:
    """Raise :class:`Stop`."""
    raise Stop


_then: Callable[[], object] = interrupt


def requested() -> bool:
    """Whether a signal asked to stop."""
    return _number is not None


def handled() -> bool:
    """Whether this process, not one that it was forked from, is inside :func:`signals`."""
    return _handler == os.getpid()


def check() -> None:
    """Raise :class:`Stop` if a signal asked to stop and :func:`on_stop` does not handle it. Loops call this."""
    if requested() and _then is interrupt:
        raise Stop


def exit_code() -> int:
    """The exit code that shells report for the signal: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1."""
    return 128 + (_number or signal.SIGINT)


@contextmanager
def signals() -> Iterator[None]:
    """Inside, handle the signals (main thread only), even a SIGINT that is ignored, as in a script's background."""
    global _number, _handler
    outer, _number, _handler = _handler, None, os.getpid()
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _number, _handler = None, outer


def finish(code: int) -> None:
    """From now on a signal ends the process at once with ``code``: only the interpreter's own clean-up is left."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))


@contextmanager
def on_stop(then: Callable[[], object]) -> Iterator[None]:
    """Inside, the first signal calls ``then`` instead of raising; at once if there was one already."""
    global _then
    before, _then = _then, then
    try:
        if requested():
            then()
        yield
    finally:
        _then = before


def with_parent(then: Callable[[], object], parent: int | None = None) -> None:
    """Call ``then``, in a thread, when the parent process ends.

    ``parent`` is its pid, in case it has ended already; by default the current parent.
    """
    parent = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        then()

    Thread(target=watch, daemon=True).start()


def _handle(number: int, frame: Any) -> None:
    global _number, _since
    if _number is None:
        _number, _since = number, time.monotonic()
        _then()
    elif number != signal.SIGUSR1 and time.monotonic() - _since > DEBOUNCE:
        raise Stop
