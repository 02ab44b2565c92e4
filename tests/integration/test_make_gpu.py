"""`make gpu` on a CPU: all its parts in small, whatever interrupts it."""

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import gpu
import gpu_tables
import pytest
import torch
from conftest import invoke
from forkserver import warm_python

BENCHMARKS = Path(gpu.__file__).parent
METHODS = ("FULL", "UDEC", "ULATDEC", "USPLIT")
PLACES = (("iid", "2"), ("label_skew", "2"))


def begin(out: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [warm_python(), str(BENCHMARKS / "gpu.py"), "--out", str(out), *arguments]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)})


def wait_for(process: subprocess.Popen[bytes], seen: Callable[[], bool]) -> None:
    while not seen():
        assert process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is not small")
def test_all_parts_interrupted_twice_end_with_the_scores_of_an_uninterrupted_run(tmp_path: Path) -> None:
    folder = tmp_path / "cpu"
    assert begin(tmp_path, "--slice", "12").wait() == gpu.MORE

    process = begin(tmp_path)
    wait_for(process, lambda: any(folder.glob("paper_iid/*/checkpoint/server-*")))
    process.send_signal(signal.SIGTERM)
    assert process.wait() == gpu.MORE
    early = {path: path.read_bytes() for path in (folder / "results").glob("*.json")}
    stopped = next(folder.glob("paper_iid/*/checkpoint")).parent

    assert begin(tmp_path).wait() == 0
    assert all(path.read_bytes() == content for path, content in early.items())
    with (folder / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(*place, method, "done") for place, method in product(PLACES, METHODS)]
    assert [(row["partition"], row["clients"], row["method"], row["state"]) for row in rows] == expected
    page = (folder / "tables.md").read_text()
    assert "no GPU" in page
    assert gpu_tables.NOT_YET not in page
    assert all(f"| {name} | " in page for name in gpu.STEPS)
    assert all(f"| {name}: {n} of 2 images | " in page for name in gpu.FUSED for n in (1, 3))

    tables = page, (folder / "cells.csv").read_bytes()
    assert begin(tmp_path).wait() == 0
    assert ((folder / "tables.md").read_text(), (folder / "cells.csv").read_bytes()) == tables

    config = json.loads(gpu.result_path(folder, f"grid {gpu.SMALL_SIZE.grid[0]}").read_text())["settings"]
    method = stopped.name.partition("-")[0]
    again = [argument for argument in config if not argument.startswith(("output=", "method="))]
    assert invoke(*again, f"output={tmp_path / 'again'}", f"method={method}") == 0
    (whole,) = (tmp_path / "again").glob("*/*/result.json")
    keys = ("state_sha256", "client_sha256", "fid")
    found = [json.loads(path.read_text()) for path in (whole, stopped / "result.json")]
    assert [found[0][key] for key in keys] == [found[1][key] for key in keys]


def test_a_part_that_fails_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> gpu.Found:
        raise RuntimeError("no compiler\nis here")

    units = [gpu.Unit("bad", fail), gpu.Unit("good", lambda: {"rows": [{"limit": "copy"}]})]
    monkeypatch.setattr(gpu, "units_of", lambda *_: units)
    with pytest.raises(SystemExit):
        gpu.work(tmp_path, gpu.SMALL_SIZE)
    assert gpu_tables.read(tmp_path, "good")["rows"] == [{"not available": gpu_tables.NOT_YET}]
    gpu.work(tmp_path, gpu.SMALL_SIZE)
    assert gpu_tables.read(tmp_path, "bad")["rows"] == [
        {"not available": "RuntimeError: no compiler is here"}
    ]
    assert gpu_tables.read(tmp_path, "good")["rows"] == [{"limit": "copy"}]


def test_the_cells_of_a_gpu_take_what_was_measured_to_be_fastest(tmp_path: Path) -> None:
    assert gpu.chosen(tmp_path) == ["trainer.compile=false", "trainer.workers=1"]
    for name, seconds in (("bf16", 0.02), ("compiled bf16", 0.01)):
        gpu.keep(tmp_path, f"step {name}", {"rows": [{"step": name, "seconds": seconds}]})
    for processes, speed in ((1, 100.0), (2, 180.0), (4, 150.0)):
        gpu.keep(tmp_path, f"at once {processes}", {"rows": [{"processes": processes, "images/s": speed}]})
    gpu.keep(tmp_path, "at once 8", gpu.missing("out of memory"))
    assert gpu.chosen(tmp_path) == ["trainer.compile=true", "trainer.workers=2"]


def test_no_row_of_a_gpu_is_in_the_tables_of_a_cpu(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (BENCHMARKS.parent / "docs").rglob("*")}
    assert gpu_tables.write_tables(tmp_path, None, []) == 0
    assert {path: path.stat().st_mtime_ns for path in (BENCHMARKS.parent / "docs").rglob("*")} == before
