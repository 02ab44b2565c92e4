"""What the processes of a cell have used: memory, and the time in which images were drawn."""

from typing import Any, NamedTuple

from fedlight.runtime.peak_memory import PeakGpuMemory, PeakMemory


class Usage(NamedTuple):
    """What one process has used for a cell.

    Attributes:
        process: its unique name.
        peak_mb: peak of its resident memory so far, in MB; None where it is not known.
        gpu_peak_mb: peak of its memory on a GPU; None without one.
        sampling: seconds in which it drew images since its last report.
    """

    process: str
    peak_mb: float | None
    gpu_peak_mb: float | None
    sampling: float


class UsageMeter:
    """Measures what this process uses for a cell, from when it is made.

    Args:
        process: a unique name.
    """

    def __init__(self, process: str) -> None:
        self._process = process
        self._memory, self._gpu_memory = PeakMemory(), PeakGpuMemory()

    def read(self, sampling: float) -> Usage:
        """The peaks so far, with the seconds in which images were drawn since the last report."""
        return Usage(self._process, self._memory.megabytes, self._gpu_memory.megabytes, sampling)


class UsageLog:
    """The reports of a cell's other processes.

    Attributes:
        reports: process: its last report.
        sampling: seconds of all reports that were not taken yet.
    """

    def __init__(self) -> None:
        self.reports: dict[str, Usage] = {}
        self.sampling = 0.0

    def note(self, usage: Usage) -> None:
        """Takes the report of a process."""
        self.reports[usage.process] = usage
        self.sampling += usage.sampling

    def take_sampling(self) -> float:
        """Seconds in which other processes drew images since the last call."""
        seconds, self.sampling = self.sampling, 0.0
        return seconds

    def memory(self, own: Usage, earlier: dict[str, Any] | None) -> dict[str, float | int | None]:
        """The entry `memory` of `result.json`: the sum of the peaks of all processes of the cell.

        Args:
            own: of the cell's own process.
            earlier: the entry of the processes before a restart; None without one.
        """
        everyone = [own, *self.reports.values()]
        peak = _sum([usage.peak_mb for usage in everyone])
        gpu = _sum([usage.gpu_peak_mb for usage in everyone])
        before = earlier or {}
        return {
            "peak_mb": _larger(peak, before.get("peak_mb")),
            "gpu_peak_mb": _larger(gpu, before.get("gpu_peak_mb")),
            "processes": max(len(everyone), before.get("processes") or 0),
        }


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known), 1) if len(known) == len(values) else None


def _larger(now: float | None, before: float | None) -> float | None:
    return max((value for value in (now, before) if value is not None), default=None)
