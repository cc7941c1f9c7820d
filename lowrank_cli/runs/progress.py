"""The progress bar: rate and time left on a terminal; without one, only the lines printed above it."""

from __future__ import annotations

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
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lowrank_cli.runs import stopping
from lowrank_cli.terminal import Terminal


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
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    where = console()
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
