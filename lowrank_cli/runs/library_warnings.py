"""Warnings of libraries go into the run's ``warnings.txt`` instead of the console."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lowrank_cli.runs.run import Run

FILE = "warnings.txt"


class _Once(logging.Filter):
    """Passes each message once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


def _console_loggers() -> list[logging.Logger]:
    """Loggers with their own console handler, such as transformers' and torch's."""
    return [
        logger
        for logger in logging.root.manager.loggerDict.values()
        if isinstance(logger, logging.Logger)
        and any(
            isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler) for h in logger.handlers
        )
    ]


class _File(logging.FileHandler):
    """Raises errors of writing, where logging would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


@contextmanager
def library_warnings(run: Run) -> Iterator[None]:
    """Inside, Python's warnings and the libraries' log messages are appended to the run's file, each message once.

    Enter it after importing the libraries: their console handlers are looked up then.
    """
    file = run.file(FILE)
    handler = _File(file, delay=True, encoding="utf-8") if run.writes else logging.NullHandler()
    handler.addFilter(_Once())
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    root, before = logging.getLogger(), {logger: logger.handlers for logger in _console_loggers()}
    logging.captureWarnings(True)
    root.addHandler(handler)
    for logger in before:
        logger.handlers = [] if logger.propagate else [handler]
    try:
        yield
    finally:
        for logger, handlers in before.items():
            logger.handlers = handlers
        root.removeHandler(handler)
        logging.captureWarnings(False)
        handler.close()
