"""The progress bar: rate and time left on a terminal; without one, only the lines printed above it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from lowrank_cli.runs import stopping
from lowrank_cli.terminal import Terminal

WIDE = 80  #: columns of a terminal from which on the bar itself and a note fit next to the numbers


class _Rate(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "–/s", style="progress.data.speed")


class Watched(Terminal):
    """A console whose closed pipe does not stop the run (``lrk train 2>&1 | head``)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def console() -> Terminal:
    """The console for progress and notes: stderr, so that stdout holds results only."""
    return Watched(stderr=True)


@contextmanager
def bar(description: str, total: int, *, shown: bool, start: int = 0) -> Iterator[Bar]:
    """A bar over ``total`` units, ``start`` of them already done; with ``shown=False`` it prints nothing."""
    where = console()
    where.file = sys.stderr  # stays, if a library's own output is redirected meanwhile
    whole = Column(no_wrap=True)  # only the bar itself gives way on a narrow terminal
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False, table_column=whole),
        MofNCompleteColumn(table_column=whole),
        _Rate(table_column=whole),
        TimeRemainingColumn(table_column=whole),
        TextColumn("left", table_column=whole),
    ]
    if where.width >= WIDE:
        columns.insert(1, BarColumn(bar_width=None, table_column=Column(no_wrap=False)))
        columns.append(TextColumn("{task.fields[note]}", markup=False, table_column=whole))
    disabled = not (shown and where.is_terminal)
    with Progress(*columns, console=where, disable=disabled, transient=True) as progress:
        yield Bar(progress, progress.add_task(description, total=total, completed=start, note=""), shown)


class Bar:
    """One line of progress."""

    def __init__(self, progress: Progress, task_id: TaskID, shown: bool):
        self._progress, self._task, self._shown = progress, task_id, shown

    def advance(self, count: int = 1) -> None:
        """Count finished units. Raises KeyboardInterrupt if a signal asked the run to stop."""
        stopping.check()
        self._progress.advance(self._task, count)

    def expect(self, count: int) -> None:
        """Add ``count`` units to the total."""
        self._progress.update(self._task, total=(self._progress.tasks[self._task].total or 0) + count)

    def note(self, text: str) -> None:
        """Show ``text`` after the numbers."""
        self._progress.update(self._task, note=text)

    @contextmanager
    def watch(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A second bar below, for something slow within a step; yields a function that counts finished units."""
        task = self._progress.add_task(description, total=total, note="")
        try:
            yield lambda count: self._progress.advance(task, count)
        finally:
            self._progress.remove_task(task)

    def say(self, text: str) -> None:
        """Print a line above the bar, with or without a terminal."""
        if self._shown:
            self._progress.console.print(text, soft_wrap=True)
