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


@contextmanager
def stoppable() -> Iterator[None]:
    """Turns the first SIGTERM or SIGINT while the body runs into Interrupted; further ones change nothing.

    Handlers that are there already belong to a scheduler's library, and stay.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise Interrupted(number)

    before = {
        number: handler
        for number in (signal.SIGTERM, signal.SIGINT)
        if (handler := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler)
    }
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
