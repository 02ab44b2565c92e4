"""Start and end of a worker process; imports nothing heavy, so that it can end during later imports."""

import gc
import os
import signal
import threading
import time

from loky import process_executor

LOOK = 0.2  # seconds between two checks, of the parent process or of tasks
SIGNALS = ("SIGINT", "SIGUSR1", "SIGUSR2")  # handled by the main process, which ends its workers


def begin(parent: int) -> None:
    """Initialises a worker process.

    Args:
        parent: id of the process that started the worker; the worker ends with it.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    gc.disable()  # imports leave no garbage, and the search for it takes a second
    process_executor._MAX_MEMORY_LEAK_SIZE = float("inf")  # a model is no leak: loky would end the worker
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)
