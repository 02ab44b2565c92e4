"""Settings of the process's memory: malloc and Python's garbage collector."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
MEBIBYTES_AT_ONCE = 64


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory; does nothing with another C library.

    A training step repeatedly frees and allocates large tensors of the same sizes. By default the kernel maps
    each of them anew, page by page, which takes a fifth of a step of the paper's UNet.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(TOP_PAD, MEBIBYTES_AT_ONCE * 2**20)


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Switches Python's garbage collector off while libraries load, which is faster and leaves no garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
