"""Two processes never work on one cell."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import SMALL

from fedlight.runtime import lock, slurm_jobs
from fedlight.runtime.errors import Held
from fedlight.runtime.lock import Holder, hold, is_alive, read_holder, this_process

HOLDING = """
import sys
from pathlib import Path
from fedlight.runtime.errors import Held
from fedlight.runtime.lock import hold
sys.stdin.readline()
try:
    with hold(Path("cell")):
        print("works", flush=True)
        sys.stdin.readline()
except Held as error:
    print(error, flush=True)
"""

Process = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    """Starts a process that holds the folder `cell` between its first and its second line of input."""
    processes: list[Process] = []

    def call() -> Process:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", HOLDING], cwd=tmp_path, text=True, **pipes)
        processes.append(process)
        return process

    yield call
    for process in processes:
        process.kill()
        process.communicate()


def tell(process: Process) -> None:
    """Hands a process a line of input."""
    process.stdin.write("\n")
    process.stdin.flush()


def test_of_two_processes_at_once_one_works(start: Callable[[], Process], tmp_path: Path) -> None:
    for _ in range(20):
        pair = [start(), start()]
        for process in pair:
            tell(process)
        said = [process.stdout.readline().strip() for process in pair]
        assert sorted(said)[1] == "works", said
        worker = pair[said.index("works")]
        assert sorted(said)[0].startswith(f"cell: at work already: process {worker.pid} on ")
        for process in pair:
            process.communicate("\n")
        assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_is_followed_at_once(start: Callable[[], Process], tmp_path: Path) -> None:
    first = start()
    tell(first)
    assert first.stdout.readline() == "works\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert read_holder(tmp_path / "cell")[0].pid == first.pid
    began = time.monotonic()
    with hold(tmp_path / "cell"):
        assert read_holder(tmp_path / "cell")[0].pid == os.getpid()
    assert time.monotonic() - began < 2


def test_a_holder_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with hold(tmp_path / "cell"):
        _, before = read_holder(tmp_path / "cell")
        time.sleep(0.3)
        _, after = read_holder(tmp_path / "cell")
    assert after > before


def test_holding_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / "result.json").touch()
    with hold(tmp_path / "cell"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["cell", "result.json"]


@pytest.fixture
def elsewhere() -> Holder:
    """A holder on another node."""
    there = {"host": "other", "boot": "another", "namespace": "pid:[1]", "pid": 7, "started": "1"}
    return replace(this_process(), **there)


def test_another_node_counts_by_its_last_sign_of_life(elsewhere: Holder, tmp_path: Path) -> None:
    cell = tmp_path / "cell"
    cell.mkdir()
    (cell / lock.HOLDER).write_text(json.dumps(asdict(elsewhere)))
    with pytest.raises(Held, match="cell: at work already: process 7 on other, since"), hold(cell):
        pass
    assert read_holder(cell)[0] == elsewhere
    long_ago = time.time() - lock.SILENCE - 1
    os.utime(cell / lock.HOLDER, (long_ago, long_ago))
    with hold(cell):
        assert read_holder(cell)[0] == replace(this_process(), since=read_holder(cell)[0].since)


def test_this_node_before_it_was_started_again_is_dead(elsewhere: Holder) -> None:
    assert not is_alive(replace(elsewhere, host=socket.gethostname()), silent=0)


def test_a_process_number_used_again_is_another_process() -> None:
    assert is_alive(this_process(), silent=1e9)
    assert not is_alive(replace(this_process(), started="1"), silent=0)


@pytest.mark.parametrize(
    ("states", "alive"),
    [
        ({"12_3": "RUNNING"}, True),
        ({"12_3": "PENDING"}, False),
        ({}, False),
        (None, True),
    ],
)
def test_slurm_knows_whether_the_job_of_another_node_runs(
    elsewhere: Holder, monkeypatch: pytest.MonkeyPatch, states: dict[str, str] | None, alive: bool
) -> None:
    monkeypatch.setattr(slurm_jobs, "job_states", lambda jobs: states)
    assert is_alive(replace(elsewhere, job="12_3"), silent=0) is alive


def test_a_suspended_job_lives_in_silence(elsewhere: Holder) -> None:
    assert is_alive(replace(elsewhere, job="12"), silent=1e9, jobs={"12": "SUSPENDED"})


def test_a_job_that_slurm_started_again_follows_itself(
    elsewhere: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not is_alive(replace(elsewhere, job="12"), silent=0)
    assert is_alive(replace(elsewhere, job="12", restart=1), silent=0, jobs={"12": "RUNNING"})


def test_a_cell_at_work_is_refused_in_one_line(
    command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cell = [*SMALL, "rounds=0", "evaluation.grid=0"]
    assert command(*cell) == 0
    (result,) = tmp_path.glob("runs/default/*/result.json")
    result.unlink()
    with hold(result.parent):
        assert command(*cell) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"fedlight: error: {result.parent.name}: at work already: process {os.getpid()} on "
    )
    assert not result.exists()
    assert command(*cell) == 0
