"""Ctrl-C, SIGTERM (Slurm, ``timeout``, containers) and SIGUSR1 (``sbatch --signal``): one way to stop.

The first signal raises :class:`Stop` in the main thread, or calls what :func:`on_stop` names: a training loop ends
its step and saves first. Libraries may swallow an exception that comes out of nowhere, so loops also call
:func:`check`. A second Ctrl-C or SIGTERM raises wherever it arrives. SIGUSR1 only asks, however often it comes, which
makes it the signal by which one process hands a stop on to another.
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
LOOK = 0.5  # s between two looks for what another process does
ONE = 0.5  # s: signals this close are one (`timeout` sends to the process and then to its group)


class Stop(KeyboardInterrupt):
    """A signal came. A class of its own: CPython ends a process in which ``exec`` saw a plain KeyboardInterrupt by
    SIGINT, whatever became of the exception."""


_number: int | None = None  #: the first signal
_since = 0.0  #: when it came, in s of the monotonic clock


def interrupt() -> None:
    """Stop here."""
    raise Stop


_then: Callable[[], object] = interrupt


def requested() -> bool:
    """Whether a signal came."""
    return _number is not None


def check() -> None:
    """A place where a loop can stop: raise :class:`Stop` if a signal came, unless :func:`on_stop` handles it."""
    if requested() and _then is interrupt:
        raise Stop


def exit_code() -> int:
    """What shells report for the signal that came: 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1."""
    return 128 + (_number or signal.SIGINT)


@contextmanager
def signals() -> Iterator[None]:
    """Handle the signals inside, in the main thread; what handled them before does so again afterwards.

    SIGINT is handled even where it came ignored, as in the background of a script.
    """
    global _number
    _number = None
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _number = None


@contextmanager
def on_stop(then: Callable[[], object]) -> Iterator[None]:
    """Inside, the first signal calls ``then`` and raises nothing; at once, if it came already."""
    global _then
    before, _then = _then, then
    try:
        if requested():
            then()
        yield
    finally:
        _then = before


def with_parent(then: Callable[[], object], parent: int | None = None) -> None:
    """Call ``then``, in a thread, when the process that started this one has ended.

    ``parent`` is its number, as it may have ended already; None where that is not known.
    """
    parent = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        then()

    Thread(target=watch, daemon=True).start()


def _handle(number: int, frame: Any) -> None:
    global _number, _since
    if _number is None:
        _number, _since = number, time.monotonic()
        _then()
    elif number != signal.SIGUSR1 and time.monotonic() - _since > ONE:
        raise Stop
