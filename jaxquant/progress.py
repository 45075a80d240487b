"""Progress of long loops on stderr: live bars on a terminal, an occasional plain line anywhere else."""

import operator
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

QUIET_SECONDS = 2.0  # loops that end sooner print no line
LINE_SECONDS = 5.0  # least time between lines


class _Loop:
    """One running `track`: how far it is and when it began."""

    def __init__(self, description: str, total: int | None):
        self.description, self.total = description, total
        self.done, self.begin = 0, time.monotonic()

    def __str__(self):
        elapsed = time.monotonic() - self.begin
        if self.total is None:
            return f"{self.description}: {self.done} done, {_duration(elapsed)} so far"
        percent = f"{100 * self.done / max(self.total, 1):.0f}% ({self.done}/{self.total})"
        if self.done >= self.total:
            return f"{self.description}: {percent}, took {_duration(elapsed)}"
        left = f", {_duration(elapsed / self.done * (self.total - self.done))} left" if self.done else ""
        return f"{self.description}: {percent}{left}"


# Nested loops share one display and one clock: a terminal has room for one live display, and a log for few lines.
_loops: list[_Loop] = []
_bars: list[Progress] = []
_last_line = 0.0


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields the items of `iterable` and shows how many are done and how long the rest will take.

    On a terminal each loop is a bar, nested ones below the outer. Elsewhere (a file, a pipe, a notebook) a plain line
    such as "blocks: 37% (11/30), 2m05s left" is written at most every 5 seconds, inner loops appended to the outer,
    and nothing at all for work that ends within 2 seconds.

    Args:
      iterable: what to loop over; an item counts as done when the next one is asked for.
      description: what the loop does, a few words.
      total: number of items; by default `len(iterable)` where it has one, else unknown (no percentage).

    Yields:
      The items.
    """
    if total is None:
        total = operator.length_hint(iterable) or None
    if sys.stderr.isatty():
        yield from _track_bar(iterable, description, total)
    else:
        yield from _track_lines(iterable, description, total)


def _track_bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    if not _bars:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        # An item may take minutes, so the speed is that of the last hour. Prints go above the bars, but not from a
        # redirected stdout to stderr.
        options = {"speed_estimate_period": 3600.0, "redirect_stdout": sys.stdout.isatty()}
        _bars.append(Progress(*columns, *times, console=Console(stderr=True), **options))
        _bars[0].start()
    bar = _bars[0]
    task = bar.add_task(description, total=total)
    try:
        for item in iterable:
            yield item
            bar.advance(task)
    finally:
        # The outermost loop's bar stays on the screen; inner ones make room.
        if len(bar.tasks) > 1:
            bar.remove_task(task)
        else:
            bar.stop()
            _bars.remove(bar)


def _track_lines(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    global _last_line
    loop = _Loop(description, total)
    _loops.append(loop)
    try:
        for item in iterable:
            yield item
            loop.done += 1
            now = time.monotonic()
            if now - _loops[0].begin >= QUIET_SECONDS and now - _last_line >= LINE_SECONDS and loop.done != total:
                _last_line = now
                _write(" > ".join(map(str, _loops)))
        loop.total = loop.done
        if len(_loops) == 1 and time.monotonic() - loop.begin >= QUIET_SECONDS:
            _write(str(loop))
    finally:
        _loops.remove(loop)


def _write(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _duration(seconds: float) -> str:
    """Returns "48s", "2m05s" or "3h10m"."""
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
    )
