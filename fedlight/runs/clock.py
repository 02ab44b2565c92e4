"""The time that a cell has taken since its last stored round, so that it counts after a kill."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fedlight.runtime.files import atomic

EVERY = 1.0  # seconds between two marks


class Spent(NamedTuple):
    """Seconds since a round was stored: in all, and in training of the round after it."""

    total: float = 0.0
    training: float = 0.0


class Clock:
    """Keeps the time in a file, which may be lost: then it counts from the last round."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marked = 0.0

    def spent_after(self, round_: int) -> Spent:
        """What earlier processes spent after that round; nothing where they went on from another."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            return (
                Spent(float(kept["total"]), float(kept["training"])) if kept["round"] == round_ else Spent()
            )
        except (OSError, ValueError, TypeError, KeyError):
            return Spent()

    def mark(self, round_: int, spent: Spent) -> None:
        """Notes what was spent after that round, where the last note is old enough."""
        if time.monotonic() - self._marked < EVERY:
            return
        self._marked = time.monotonic()
        with suppress(OSError), atomic(self._path, durable=False) as temporary:  # no reason to end a cell
            temporary.write_text(json.dumps({"round": round_, **spent._asdict()}), encoding="utf-8")

    def clear(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)
