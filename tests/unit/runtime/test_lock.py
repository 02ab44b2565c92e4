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
from typing import Any

import pytest
from conftest import SMALL

from fedlight.runtime import lease, slurm_jobs
from fedlight.runtime.errors import Held
from fedlight.runtime.lease import Holder, hold, is_alive, read_holder, this_process

HOLDING = """
import sys
from pathlib import Path
from fedlight.runtime.errors import Held
from fedlight.runtime.lease import hold
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


@pytest.mark.slow
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
    monkeypatch.setattr(lease, "BEAT", 0.05)
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
    (cell / lease.HOLDER).write_text(json.dumps(asdict(elsewhere)))
    with pytest.raises(Held, match="cell: at work already: process 7 on other, since"), hold(cell):
        pass
    assert read_holder(cell)[0] == elsewhere
    long_ago = time.time() - lease.SILENCE - 1
    os.utime(cell / lease.HOLDER, (long_ago, long_ago))
    with hold(cell):
        found = read_holder(cell)[0]
        assert found == replace(this_process(), since=found.since, token=found.token)


def test_a_node_of_the_same_name_is_another_node(elsewhere: Holder) -> None:
    namesake = replace(elsewhere, host=socket.gethostname())
    assert is_alive(namesake, silent=0)
    assert not is_alive(namesake, silent=lease.SILENCE)


@pytest.mark.parametrize("ahead", [120.0, -120.0])
def test_a_sign_of_life_is_judged_by_the_clock_of_the_file_system(
    ahead: float, elsewhere: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cell").mkdir()
    signed = tmp_path / "cell" / lease.HOLDER
    signed.write_text(json.dumps(asdict(elsewhere)))
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + ahead)
    with pytest.raises(Held), hold(tmp_path / "cell"):
        pass
    long_ago = right() - lease.SILENCE - 1
    os.utime(signed, (long_ago, long_ago))
    with hold(tmp_path / "cell"):
        pass


def take_over(cell: Path, successor: Holder) -> None:
    """What another node does that takes the holder for dead: its lock reaches not so far."""
    (cell / lease.HOLDER).unlink()
    (cell / lease.HOLDER).write_text(json.dumps(asdict(replace(successor, token="another"))))


def test_a_deposed_holder_is_told_and_leaves_its_successor_alone(
    elsewhere: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.02)
    cell = tmp_path / "cell"
    with hold(cell) as held:
        held.check()
        take_over(cell, elsewhere)
        held.check(every=60)  # it looked a moment ago
        with pytest.raises(
            Held, match=r"cell: taken over by process 7 on other, since .*; this process stops"
        ):
            held.check()
        os.utime(cell / lease.HOLDER, (1, 1))
        time.sleep(0.2)
        assert read_holder(cell)[1] == 1
    assert read_holder(cell)[0].token == "another"
    assert (cell / lease.LOCK).exists()


@pytest.mark.slow
def test_a_deposed_cell_stores_nothing_more_and_says_so_in_one_line(
    command: Callable[..., int],
    elsewhere: Holder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from fedlight.federation.server import Server

    close = Server.finish_round

    def deposed(server: Server) -> Any:
        (cell,) = tmp_path.glob("runs/default/*")
        if server.round == 1:
            take_over(cell, elsewhere)
        return close(server)

    monkeypatch.setattr(Server, "finish_round", deposed)
    assert command(*SMALL, "rounds=3") == 1
    (cell,) = tmp_path.glob("runs/default/*")
    assert [path.name[:12] for path in cell.glob("checkpoint/server-*")] == ["server-r0001"]
    assert not (cell / "result.json").exists()
    assert read_holder(cell)[0].token == "another"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fedlight: error: {cell.name}: taken over by process 7 on other")


def test_a_cell_is_held_without_hard_links(
    elsewhere: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*paths: Any, **named: Any) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    cell = tmp_path / "cell"
    with hold(cell):
        assert read_holder(cell)[0].pid == os.getpid()
    cell.mkdir()
    (cell / lease.HOLDER).write_text(json.dumps(asdict(elsewhere)))
    os.utime(cell / lease.HOLDER, (1, 1))
    with hold(cell):
        assert [path.name for path in sorted(cell.iterdir())] == [lease.HOLDER, lease.LOCK]


def test_of_two_nodes_without_locks_that_find_a_dead_holder_one_follows(
    elsewhere: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks at the dead holder, and acts when the first has signed."""
    path = tmp_path / lease.HOLDER
    path.write_text(json.dumps(asdict(elsewhere)))
    os.utime(path, (1, 1))
    old, look = lease._look(path), lease._look
    first = lease._sign(tmp_path, json.dumps(asdict(replace(elsewhere, token="first"))).encode())
    assert first is not None
    late = [old]
    monkeypatch.setattr(lease, "_look", lambda path: late.pop() if late else look(path))
    assert lease._sign(tmp_path, json.dumps(asdict(replace(elsewhere, token="second"))).encode()) is None
    os.close(first)
    assert read_holder(tmp_path)[0].token == "first"
    assert [path.name for path in tmp_path.iterdir()] == [lease.HOLDER]


def test_a_signature_that_cannot_be_read_is_waited_out(tmp_path: Path) -> None:
    path = tmp_path / lease.HOLDER
    path.touch()
    assert lease._sign(tmp_path, b"{}") is None
    os.utime(path, (1, 1))
    file = lease._sign(tmp_path, b"{}")
    assert file is not None
    os.close(file)


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
