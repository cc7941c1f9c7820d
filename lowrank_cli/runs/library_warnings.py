"""What libraries warn about goes into ``warnings.txt`` of the run's folder, not between its lines on the console."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lowrank_cli.runs.run import Run

FILE = "warnings.txt"


class _Once(logging.Filter):
    """Lets each message through the first time."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


def _printing() -> list[logging.Logger]:
    """Loggers with a handler of their own that writes to the console, such as transformers' and torch's."""
    return [
        logger
        for logger in logging.root.manager.loggerDict.values()
        if isinstance(logger, logging.Logger)
        and any(
            isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler) for h in logger.handlers
        )
    ]


class _File(logging.FileHandler):
    """What cannot be written ends the work like any other file, without a traceback of logging's own on stderr."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


@contextmanager
def library_warnings(run: Run) -> Iterator[None]:
    """Inside, Python's warnings and what libraries log are appended to the run's file, each message once.

    Enter it after the libraries are imported: what prints for itself is looked up then.
    """
    file = run.file(FILE)
    handler = _File(file, delay=True, encoding="utf-8") if run.writes else logging.NullHandler()
    handler.addFilter(_Once())
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    root, before = logging.getLogger(), {logger: logger.handlers for logger in _printing()}
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
