"""The peak memory of a process while it works for a cell, also where it worked for others before."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET = "5"  # what the kernel takes as the order to set the mark to the memory of now
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of `ru_maxrss`


class PeakMemory:
    """Measures from when it is made.

    Memory that earlier work has freed is returned to the system first. Then the kernel's high-water mark of
    resident memory is reset. Where that is not permitted, or there is no /proc, the peak is known only if
    the mark rises later.
    """

    def __init__(self) -> None:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        self._is_reset = _reset()
        self._before = _high_water_mark()

    @property
    def megabytes(self) -> float | None:
        """The peak of resident memory so far, in MB (1e6 bytes); None where it is not known."""
        mark = _high_water_mark()
        return mark / 1e6 if self._is_reset or mark > self._before else None


class PeakGpuMemory:
    """Measures, from when it is made, the memory that torch has allocated on this process's GPU."""

    def __init__(self) -> None:
        import torch.cuda

        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    @property
    def megabytes(self) -> float | None:
        """The peak so far, in MB; None where the process uses no GPU."""
        import torch.cuda

        if not torch.cuda.is_initialized():
            return None
        return torch.cuda.max_memory_allocated() / 1e6


def _reset() -> bool:
    """Sets the high-water mark to the memory of now; returns whether that was permitted."""
    try:
        CLEAR.write_text(RESET, encoding="ascii")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    """The most resident memory that this process has had since its start or the last reset, in bytes."""
    try:
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT
