"""Progress of long work: bars at a terminal and in a notebook, elsewhere a line on stderr every minute."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from fedlight.runtime.notebook_progress import NotebookProgress

EVERY = 60.0  # seconds between two lines

T = TypeVar("T")


class ProgressLines:
    """Prints at most one line in EVERY seconds, with the estimated time that is left.

    Args:
        what: names the work.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = self._printed = time.monotonic()
        self._first_share: float | None = None

    def update(self, share: float | None, status: str) -> None:
        """Prints a line if one is due.

        Args:
            share: of the work that is done, 0..1, or None if it is unknown.
            status: for example `3 of 10 rounds`.
        """
        now = time.monotonic()
        if self._first_share is None:
            self._first_share, self._started = share or 0.0, now
        if now - self._printed < EVERY or (share is not None and share <= self._first_share):
            return
        self._printed = now
        if share is not None:
            left = (now - self._started) * (1 - share) / (share - self._first_share)
            status = f"{status}, about {timedelta(seconds=round(left))} left"
        print(f"fedlight: {self._what}: {status}", file=sys.stderr)


def make_progress(*columns: str | ProgressColumn) -> Progress:
    """Bars for a terminal or a notebook, which vanish when they are stopped; elsewhere disabled ones.

    Args:
        columns: of each bar; rich's default ones without any.
    """
    console = Console(stderr=True)
    if console.is_jupyter:
        return NotebookProgress(*columns)
    # rich also takes FORCE_COLOR, which a notebook's kernel sets for its processes, for a terminal
    return Progress(*columns, console=console, disable=not console.file.isatty(), transient=True)


def track(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    """Yields the items and shows their number; `total` is None if it is unknown."""
    progress = make_progress()
    if not progress.disable:
        with progress:
            yield from progress.track(items, total, description=what)
        return
    lines = ProgressLines(what)
    for number, item in enumerate(items):
        if total:
            lines.update(number / total, f"{number} of {total}")
        else:
            lines.update(None, str(number))
        yield item


@contextmanager
def print_every_minute(message: Callable[[], str]) -> Iterator[None]:
    """Prints a message every EVERY seconds while the block runs."""
    done = Event()

    def repeat() -> None:
        while not done.wait(EVERY):
            print(f"fedlight: {message()}", file=sys.stderr)

    Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        done.set()
