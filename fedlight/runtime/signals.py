"""Signals that ask a cell to end: it stops where it is, and its files stay good for a restart."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT = 128  # and the signal's number: the exit status of a process that a signal ended


class Interrupted(BaseException):
    """The process was asked to end; no Exception, so that no library takes it for an error of its own.

    Attributes:
        status: the exit status that it means.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.status = EXIT + number


class Stop:
    """Whether the process was asked to end.

    An exception raised by a signal's handler may come up inside any library and be taken for something
    else, so a handler only notes the signal, and whoever can stop well asks.
    """

    def __init__(self) -> None:
        self._number: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler of a signal; the next one of its kind ends the process at once."""
        self._number = number
        signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        """Raises Interrupted where the process was asked to end."""
        if self._number is not None:
            raise Interrupted(self._number)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Takes note of SIGTERM and SIGINT while the body runs.

    Handlers that are there already belong to a scheduler's library, and stay.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {
        number: handler
        for number in (signal.SIGTERM, signal.SIGINT)
        if (handler := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler)
    }
    for number in before:
        signal.signal(number, stop.note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
