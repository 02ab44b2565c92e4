"""The peak memory of a cell in a process that worked for others before."""

from pathlib import Path

import numpy as np
import pytest

from fedlight.runtime import peak_memory
from fedlight.runtime.peak_memory import PeakMemory
from fedlight.runtime.usage import Usage, UsageLog

LARGE, SMALL = 300e6, 100e6  # bytes


def use(size: float) -> None:
    """Touches so much memory, and frees it."""
    assert np.ones(int(size), np.uint8).sum() == int(size)


def peak(memory: PeakMemory) -> float:
    assert memory.megabytes is not None
    return memory.megabytes


def test_what_an_earlier_cell_used_is_not_counted() -> None:
    first = PeakMemory()
    start = peak(first)
    use(LARGE)
    assert peak(first) > start + 0.95 * LARGE / 1e6
    second = PeakMemory()
    assert peak(second) < start + 0.2 * LARGE / 1e6
    use(SMALL)
    assert 0.95 * SMALL / 1e6 < peak(second) - start < 1.5 * SMALL / 1e6


def test_without_permission_to_reset_the_mark_a_peak_is_known_only_where_it_rises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(LARGE)
    monkeypatch.setattr(peak_memory, "CLEAR", tmp_path)  # a folder cannot be written
    monkeypatch.setattr(peak_memory, "_high_water_mark", lambda: marks.pop(0))
    marks = [500_000_000, 500_000_000, 510_000_000]
    memory = PeakMemory()
    assert memory.megabytes is None
    assert memory.megabytes == 510.0


def test_without_proc_the_mark_is_that_of_getrusage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = peak_memory._high_water_mark()
    monkeypatch.setattr(peak_memory, "STATUS", tmp_path / "none")
    assert peak_memory._high_water_mark() >= 0.9 * expected


def test_the_peaks_of_all_processes_are_added_and_those_before_a_restart_count() -> None:
    log = UsageLog()
    for usage in (Usage("a", 100.0, None, 1.5), Usage("b", 50.0, None, 0.0), Usage("a", 120.0, None, 2.0)):
        log.note(usage)
    own = Usage("own", 30.0, None, 0.0)
    assert log.memory(own, None) == {"peak_mb": 200.0, "gpu_peak_mb": None, "processes": 3}
    assert log.take_sampling() == 3.5
    assert log.take_sampling() == 0
    before = {"peak_mb": 250.0, "gpu_peak_mb": 8.0, "processes": 2}
    assert log.memory(own, before) == {"peak_mb": 250.0, "gpu_peak_mb": 8.0, "processes": 3}
    assert (
        log.memory(own._replace(peak_mb=None), None)["peak_mb"] is None
    )  # a sum without one of its parts would be wrong
