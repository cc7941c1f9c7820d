"""The progress bar: rate and time left on a terminal; elsewhere only the lines said above it."""

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
    """Completed units a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "–/s", style="progress.data.speed")


class Watched(Terminal):
    """A run goes on when nobody watches it any more (``lrk train 2>&1 | head``)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def console() -> Terminal:
    """Where people watch a run: stderr, so that stdout stays clean."""
    return Watched(stderr=True)


@contextmanager
def bar(description: str, total: int, *, shown: bool, start: int = 0) -> Iterator[Bar]:
    """A bar over ``total`` units, of which ``start`` are done already."""
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
        """Count units that are done; also where a loop stops when asked to (KeyboardInterrupt)."""
        stopping.check()
        self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        """Show ``text`` behind the numbers."""
        self._progress.update(self._task, note=text)

    @contextmanager
    def watch(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A second bar below, for something slow in between; what it gives counts the units that are done."""
        task = self._progress.add_task(description, total=total, note="")
        try:
            yield lambda count: self._progress.advance(task, count)
        finally:
            self._progress.remove_task(task)

    def say(self, text: str) -> None:
        """Print a line above the bar; it also appears where there is no terminal."""
        if self._shown:
            self._progress.console.print(text, soft_wrap=True)
