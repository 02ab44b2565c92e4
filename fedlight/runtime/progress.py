"""Long work tells of itself: a bar at a terminal, elsewhere a line on stderr now and then."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from typing import TypeVar

from rich.console import Console
from rich.progress import track as bar

EVERY = 60.0  # seconds between two lines

T = TypeVar("T")


class Teller:
    """Prints a line now and then, with the time that is left."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._begun = self._told = time.monotonic()
        self._first: float | None = None

    def tell(self, share: float | None, how_far: str) -> None:
        """Prints `how_far`, where a line is due; `share` of the work is done, 0..1, or None: nobody knows."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._begun = share or 0.0, now
        if now - self._told < EVERY or (share is not None and share <= self._first):
            return
        self._told = now
        if share is not None:
            left = (now - self._begun) * (1 - share) / (share - self._first)
            how_far = f"{how_far}, about {timedelta(seconds=round(left))} left"
        print(f"fedlight: {self._what}: {how_far}", file=sys.stderr)


def track(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    """The items, and how far they have come; `total` is None where nobody knows how many there are."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from bar(items, what, total, console=console, transient=True)
        return
    teller = Teller(what)
    for number, item in enumerate(items):
        if total:
            teller.tell(number / total, f"{number} of {total}")
        else:
            teller.tell(None, str(number))
        yield item


@contextmanager
def telling(message: Callable[[], str]) -> Iterator[None]:
    """Prints a message now and then while the block works."""
    done = Event()

    def tell() -> None:
        while not done.wait(EVERY):
            print(f"fedlight: {message()}", file=sys.stderr)

    Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()
