"""Cells that are ended from outside, and what two runs of a cell must have in common."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Cell, invoke
from forkserver import fork_of, members, warm_python

LONG = [*SMALL, "name=long", "method=UDEC", "clients=4", "rounds=3", "epochs=4", "trainer.workers=2"]


def outcome(cell: Cell) -> tuple[Any, ...]:
    result = cell.result
    tables = [cell.rows("ledger.csv"), [{**row, "seconds": ""} for row in cell.rows("rounds.csv")]]
    return result["cell"], result["state_sha256"], result["client_sha256"], result["fid"], tables


def ended_well(folder: Path, arguments: list[str] = LONG) -> tuple[Any, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "executable", warm_python())  # of its workers
        assert invoke(*arguments) == 0
    (path,) = folder.glob("runs/long/*/result.json")
    return outcome(Cell(path.parent))


def end_whole(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """Signals a cell that leads its session, of which nothing may be left five seconds after its end.

    Where the fork server started it, its workers are of the session of its fork; what stands for the fork of
    a worker lives as long as that does.
    """
    leader = fork_of(process.pid)
    process.send_signal(number)
    process.wait(timeout=60)
    ended = time.monotonic()
    while left := {**members(process.pid), **members(leader)}:
        assert time.monotonic() - ended < 5, left
        time.sleep(0.05)
