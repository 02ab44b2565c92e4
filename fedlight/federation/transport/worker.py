"""How a worker process begins and ends; it loads nothing heavy, so that it can end while libraries load."""

import gc
import os
import signal
import threading
import time

from loky import process_executor

LOOK = 0.2  # seconds between two looks at the parent process
SIGNALS = ("SIGINT", "SIGUSR1", "SIGUSR2")  # for the main process, which ends its workers


def begin(parent: int) -> None:
    """The first thing that a worker does.

    Args:
        parent: the process that started it, and with which it ends.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    gc.disable()  # libraries leave no garbage while they load, and looking for it takes a second
    process_executor._MAX_MEMORY_LEAK_SIZE = float("inf")  # a model is no leak: loky would end the worker
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)
