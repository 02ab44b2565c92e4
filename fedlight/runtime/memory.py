"""Memory and garbage: what the process keeps instead of asking for it again, or looking for it in vain."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
MEBIBYTES_AT_ONCE = 64


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep what is freed; with another C library nothing happens.

    A training step frees large tensors and makes others of their size again and again. By default each of
    them is mapped anew by the kernel, page by page, which takes a fifth of a step of the paper's UNet.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(TOP_PAD, MEBIBYTES_AT_ONCE * 2**20)


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Switches Python's garbage collector off while libraries load: they leave none, and looking is slow."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
