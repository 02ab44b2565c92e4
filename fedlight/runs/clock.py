"""The time that a cell has taken since its last stored round, stored so that it counts after a kill."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fedlight.runtime.files import atomic

EVERY = 1.0  # seconds between two writes


class Spent(NamedTuple):
    """Seconds since a round was stored: in total, and in training of the next round."""

    total: float = 0.0
    training: float = 0.0


class Clock:
    """Stores the time in a file; if the file is lost, time counts from the last stored round."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marked = 0.0

    def spent_after(self, round_: int) -> Spent:
        """Time that earlier processes spent after that round; zero if they continued from another round."""
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if stored["round"] == round_:
                return Spent(float(stored["total"]), float(stored["training"]))
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return Spent()

    def mark(self, round_: int, spent: Spent) -> None:
        """Stores the time spent after that round, at most once in EVERY seconds."""
        if time.monotonic() - self._marked < EVERY:
            return
        self._marked = time.monotonic()
        with suppress(OSError), atomic(self._path, durable=False) as temporary:  # not worth ending a cell
            temporary.write_text(json.dumps({"round": round_, **spent._asdict()}), encoding="utf-8")

    def clear(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)
