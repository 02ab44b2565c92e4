"""SIGTERM and SIGINT end a cell between two steps, so that it can be resumed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT = 128  # exit status of a process that a signal ended, minus the signal's number


class Interrupted(BaseException):
    """The process received a signal to end. It is no Exception, so that libraries do not catch it.

    Attributes:
        status: exit status of the command.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.status = EXIT + number


class Stop:
    """Remembers a signal to end until the cell can stop.

    An exception raised by a signal handler could surface inside any library. So the handler only stores the
    signal, and the cell calls `check` where it can stop.
    """

    def __init__(self) -> None:
        self._number: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal; the next one of the same kind ends the process at once."""
        self._number = number
        signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        """Raises Interrupted if a signal was received."""
        if self._number is not None:
            raise Interrupted(self._number)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Handles SIGTERM and SIGINT while the block runs.

    Handlers that are set already belong to a scheduler's library and stay.
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
