"""At most one process works on a cell."""

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
from fedlight.runtime.errors import LeaseTaken
from fedlight.runtime.lease import acquire_lease, read_holder
from fedlight.runtime.process_record import HEARTBEAT_TIMEOUT, ProcessRecord, describe_this_process, is_alive

HOLDER_PROGRAM = """
import sys
from pathlib import Path
from fedlight.runtime.errors import LeaseTaken
from fedlight.runtime.lease import acquire_lease
sys.stdin.readline()
try:
    with acquire_lease(Path("cell")):
        print("works", flush=True)
        sys.stdin.readline()
except LeaseTaken as error:
    print(error, flush=True)
"""

Process = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    """Starts a process that has the lease of the folder `cell` from its first to its second line of input."""
    processes: list[Process] = []

    def call() -> Process:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", HOLDER_PROGRAM], cwd=tmp_path, text=True, **pipes)
        processes.append(process)
        return process

    yield call
    for process in processes:
        process.kill()
        process.communicate()


def send_line(process: Process) -> None:
    """Sends a process a line of input."""
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.slow
def test_one_of_two_simultaneous_processes_acquires_it(start: Callable[[], Process], tmp_path: Path) -> None:
    for _ in range(20):
        pair = [start(), start()]
        for process in pair:
            send_line(process)
        outputs = [process.stdout.readline().strip() for process in pair]
        assert sorted(outputs)[1] == "works", outputs
        worker = pair[outputs.index("works")]
        assert sorted(outputs)[0].startswith(f"cell: in use by process {worker.pid} on ")
        for process in pair:
            process.communicate("\n")
        assert list(tmp_path.iterdir()) == []


def test_the_lease_of_a_killed_process_is_free_at_once(start: Callable[[], Process], tmp_path: Path) -> None:
    first = start()
    send_line(first)
    assert first.stdout.readline() == "works\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert read_holder(tmp_path / "cell")[0].pid == first.pid
    began = time.monotonic()
    with acquire_lease(tmp_path / "cell"):
        assert read_holder(tmp_path / "cell")[0].pid == os.getpid()
    assert time.monotonic() - began < 2


def test_a_holder_sends_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
    with acquire_lease(tmp_path / "cell"):
        _, before = read_holder(tmp_path / "cell")
        time.sleep(0.3)
        _, after = read_holder(tmp_path / "cell")
    assert after > before


def test_a_lease_leaves_no_files_behind(tmp_path: Path) -> None:
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / "result.json").touch()
    with acquire_lease(tmp_path / "cell"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["cell", "result.json"]


@pytest.fixture
def remote() -> ProcessRecord:
    """A process on another machine."""
    fields = {"host": "other", "boot": "another", "namespace": "pid:[1]", "pid": 7, "started": "1"}
    return replace(describe_this_process(), **fields)


def test_a_remote_holder_is_judged_by_its_heartbeat(remote: ProcessRecord, tmp_path: Path) -> None:
    cell = tmp_path / "cell"
    cell.mkdir()
    (cell / lease.HOLDER).write_text(json.dumps(asdict(remote)))
    with pytest.raises(LeaseTaken, match="cell: in use by process 7 on other, since"), acquire_lease(cell):
        pass
    assert read_holder(cell)[0] == remote
    long_ago = time.time() - HEARTBEAT_TIMEOUT - 1
    os.utime(cell / lease.HOLDER, (long_ago, long_ago))
    with acquire_lease(cell):
        record = read_holder(cell)[0]
        assert record == replace(describe_this_process(), since=record.since, token=record.token)


def test_a_machine_of_the_same_name_is_another_machine(remote: ProcessRecord) -> None:
    namesake = replace(remote, host=socket.gethostname())
    assert is_alive(namesake, silence=0)
    assert not is_alive(namesake, silence=HEARTBEAT_TIMEOUT)


@pytest.mark.parametrize("ahead", [120.0, -120.0])
def test_a_heartbeat_is_compared_with_the_clock_of_the_file_system(
    ahead: float, remote: ProcessRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cell").mkdir()
    signed = tmp_path / "cell" / lease.HOLDER
    signed.write_text(json.dumps(asdict(remote)))
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + ahead)
    with pytest.raises(LeaseTaken), acquire_lease(tmp_path / "cell"):
        pass
    long_ago = right() - HEARTBEAT_TIMEOUT - 1
    os.utime(signed, (long_ago, long_ago))
    with acquire_lease(tmp_path / "cell"):
        pass


def take_over(cell: Path, successor: ProcessRecord) -> None:
    """Does what another machine does that sees no heartbeat and not the lock."""
    (cell / lease.HOLDER).unlink()
    (cell / lease.HOLDER).write_text(json.dumps(asdict(replace(successor, token="another"))))


def test_a_holder_notices_a_takeover_and_leaves_the_successors_files(
    remote: ProcessRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.02)
    cell = tmp_path / "cell"
    with acquire_lease(cell) as own_lease:
        own_lease.check()
        take_over(cell, remote)
        own_lease.check(every=60)  # it has just been checked
        with pytest.raises(
            LeaseTaken, match=r"cell: taken over by process 7 on other, since .*; this process stops"
        ):
            own_lease.check()
        os.utime(cell / lease.HOLDER, (1, 1))
        time.sleep(0.2)
        assert read_holder(cell)[1] == 1
    assert read_holder(cell)[0].token == "another"
    assert (cell / lease.LOCK).exists()


@pytest.mark.slow
def test_a_cell_that_was_taken_over_stores_nothing_more(
    command: Callable[..., int],
    remote: ProcessRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from fedlight.federation.server import Server

    close = Server.finish_round

    def take_over_first(server: Server) -> Any:
        (cell,) = tmp_path.glob("runs/default/*")
        if server.round == 1:
            take_over(cell, remote)
        return close(server)

    monkeypatch.setattr(Server, "finish_round", take_over_first)
    assert command(*SMALL, "rounds=3") == 1
    (cell,) = tmp_path.glob("runs/default/*")
    assert [path.name[:12] for path in cell.glob("checkpoint/server-*")] == ["server-r0001"]
    assert not (cell / "result.json").exists()
    assert read_holder(cell)[0].token == "another"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fedlight: error: {cell.name}: taken over by process 7 on other")


def test_a_lease_needs_no_hard_links(
    remote: ProcessRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*paths: Any, **named: Any) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    cell = tmp_path / "cell"
    with acquire_lease(cell):
        assert read_holder(cell)[0].pid == os.getpid()
    cell.mkdir()
    (cell / lease.HOLDER).write_text(json.dumps(asdict(remote)))
    os.utime(cell / lease.HOLDER, (1, 1))
    with acquire_lease(cell):
        assert [path.name for path in sorted(cell.iterdir())] == [lease.HOLDER, lease.LOCK]


def test_without_flock_one_of_two_successors_gets_the_lease(
    remote: ProcessRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reads the record of the ended holder, and acts after the first has written its own."""
    path = tmp_path / lease.HOLDER
    path.write_text(json.dumps(asdict(remote)))
    os.utime(path, (1, 1))
    old, read = lease._read(path), lease._read
    first = lease._write_record(tmp_path, json.dumps(asdict(replace(remote, token="first"))).encode())
    assert first is not None
    late = [old]
    monkeypatch.setattr(lease, "_read", lambda path: late.pop() if late else read(path))
    assert lease._write_record(tmp_path, json.dumps(asdict(replace(remote, token="second"))).encode()) is None
    os.close(first)
    assert read_holder(tmp_path)[0].token == "first"
    assert [path.name for path in tmp_path.iterdir()] == [lease.HOLDER]


def test_a_record_that_cannot_be_parsed_counts_until_the_heartbeat_timeout(tmp_path: Path) -> None:
    path = tmp_path / lease.HOLDER
    path.touch()
    assert lease._write_record(tmp_path, b"{}") is None
    os.utime(path, (1, 1))
    file = lease._write_record(tmp_path, b"{}")
    assert file is not None
    os.close(file)


def test_a_reused_process_number_is_another_process() -> None:
    assert is_alive(describe_this_process(), silence=1e9)
    assert not is_alive(replace(describe_this_process(), started="1"), silence=0)


@pytest.mark.parametrize(
    ("states", "alive"),
    [
        ({"12_3": "RUNNING"}, True),
        ({"12_3": "PENDING"}, False),
        ({}, False),
        (None, True),
    ],
)
def test_slurm_says_whether_a_job_on_another_machine_runs(
    remote: ProcessRecord, monkeypatch: pytest.MonkeyPatch, states: dict[str, str] | None, alive: bool
) -> None:
    monkeypatch.setattr(slurm_jobs, "job_states", lambda jobs: states)
    assert is_alive(replace(remote, job="12_3"), silence=0) is alive


def test_a_suspended_job_lives_without_heartbeats(remote: ProcessRecord) -> None:
    assert is_alive(replace(remote, job="12"), silence=1e9, jobs={"12": "SUSPENDED"})


def test_a_requeued_job_takes_over_its_own_lease(
    remote: ProcessRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not is_alive(replace(remote, job="12"), silence=0)
    assert is_alive(replace(remote, job="12", restart=1), silence=0, jobs={"12": "RUNNING"})


@pytest.mark.parametrize(("value", "job"), [("12", "12"), ("", None), ("interactive", None)])
def test_a_job_id_that_is_no_number_is_ignored(
    monkeypatch: pytest.MonkeyPatch, value: str, job: str | None
) -> None:
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", value)
    assert describe_this_process().job == job


def test_a_second_process_on_a_cell_ends_with_one_line(
    command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cell = [*SMALL, "rounds=0", "evaluation.grid=0"]
    assert command(*cell) == 0
    (result,) = tmp_path.glob("runs/default/*/result.json")
    result.unlink()
    with acquire_lease(result.parent):
        assert command(*cell) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fedlight: error: {result.parent.name}: in use by process {os.getpid()} on ")
    assert not result.exists()
    assert command(*cell) == 0
