"""A stopwatch for `with` blocks."""

import time


class Stopwatch:
    """Adds up the time spent in `with stopwatch:` blocks."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._begun = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._seconds += time.perf_counter() - self._begun

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
