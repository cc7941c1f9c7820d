"""What libraries warn about goes into ``warnings.txt`` of the run's folder, not between its lines on the console."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lowrank_cli.runs.run import Run

FILE = "warnings.txt"
LIBRARIES = ("transformers", "huggingface_hub")  #: write to stderr by a handler of their own


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


@contextmanager
def library_warnings(run: Run) -> Iterator[None]:
    """Inside, Python's warnings and what libraries log are appended to the run's file, each message once."""
    file = run.path / FILE
    handler = logging.FileHandler(file, delay=True, encoding="utf-8") if run.writes else logging.NullHandler()
    handler.addFilter(_Once())
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    root, own = logging.getLogger(), {name: logging.getLogger(name) for name in LIBRARIES}
    before = {name: logger.handlers for name, logger in own.items()}
    logging.captureWarnings(True)
    root.addHandler(handler)
    for logger in own.values():
        logger.handlers = [] if logger.propagate else [handler]
    try:
        yield
    finally:
        for name, logger in own.items():
            logger.handlers = before[name]
        root.removeHandler(handler)
        logging.captureWarnings(False)
        handler.close()
