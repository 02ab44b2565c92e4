"""Clients that train at once, in several processes: the bits of one after another, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL, Cell, workers_of
from endings import LONG, end_whole, ended_well, outcome
from forkserver import fork_of, warm_python
from hydra import compose, initialize_config_dir

from fedlight.compose import ROOT, register_resolvers
from fedlight.config import validate
from fedlight.experiment.round_loop import RoundLoop
from fedlight.federation import trainer
from fedlight.federation.messages import Update
from fedlight.federation.site import Site
from fedlight.federation.transport import processes

MakeCell = Callable[..., Cell]


@pytest.fixture(scope="module", autouse=True)
def no_worker_is_left() -> Iterator[None]:
    yield
    processes.end_workers()
    assert not workers_of(os.getpid())


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of this process begin with their libraries loaded."""
    monkeypatch.setattr(sys, "executable", warm_python())


@pytest.fixture(autouse=True)
def shares(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks workers did in each exchange; cells of this process wait for their workers first."""
    noted: list[int] = []
    exchange, submit = processes.Processes.exchange, processes.LokyPool._submit

    def counting(transport: processes.Processes, broadcasts: Any) -> Iterator[Update]:
        theirs = 0

        def done() -> None:
            nonlocal theirs
            theirs += 1

        monitor = SimpleNamespace(end_update=done, check=transport._context.monitor.check)
        transport._context = replace(transport._context, monitor=monitor)
        yield from exchange(transport, broadcasts)
        if transport._pool.workers:
            noted.append(theirs)

    def patient(pool: processes.LokyPool, task: Any, *arguments: Any) -> Any:
        future = submit(pool, task, *arguments)
        if task is processes.prepare:
            future.exception()
        return future

    monkeypatch.setattr(processes.Processes, "exchange", counting)
    monkeypatch.setattr(processes.LokyPool, "_submit", patient)
    return noted


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["method=UDEC", "clients=4", "evaluation.samples=100"],
        ["trainer.fuse=2", "method=UDEC", "clients=7", "algorithm=scaffold", "partition=label_skew"],
        [
            "transform=int4",
            "method=ULATDEC",
            "clients=5",
            "fraction=0.6",
            "federation.dropout=0.2",
            "model.ema_decay=0.9",
            "rounds=3",
        ],
    ],
    ids=lambda arguments: arguments[0],
)
def test_two_processes_give_the_bits_of_one(cell: MakeCell, shares: list[int], arguments: list[str]) -> None:
    alone = outcome(cell(*arguments, "trainer.workers=1"))
    assert not shares
    assert outcome(cell(*arguments, "trainer.workers=2")) == alone
    assert sum(shares) >= len(shares) > 1


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_any_number_of_workers_trains_a_round(cell: MakeCell, shares: list[int]) -> None:
    cells = [cell("method=USPLIT", "clients=4", f"trainer.workers={n}") for n in (1, 9)]
    assert outcome(cells[0]) == outcome(cells[1])
    assert sum(shares) >= 6  # three of four processes, since there are no more clients


def test_the_cores_are_shared_by_workers_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "CORES", 8)
    monkeypatch.delenv("FEDLIGHT_WORKERS", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def room(device: torch.device, *overrides: str) -> int:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return trainer.max_workers(
                validate(compose("config", ["clients=20", *overrides])).trainer, device
            )

    register_resolvers()
    assert [room(cpu), room(cpu, "trainer.threads=3"), room(cpu, "trainer.threads=null")] == [8, 2, 1]
    assert [room(gpu), room(gpu, "trainer.workers=4"), room(cpu, "trainer.workers=30")] == [1, 4, 30]


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_the_transport_is_no_part_of_the_cell(cell: MakeCell, shares: list[int]) -> None:
    plain = outcome(cell("method=UDEC", "clients=3"))
    assert outcome(cell("method=UDEC", "clients=3", "transport=inline", "trainer.workers=2")) == plain
    assert not shares
    chosen = ("transport=processes", "transport.workers=2")
    assert outcome(cell("method=UDEC", "clients=3", *chosen)) == plain
    assert len(shares) == 2


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["null", "2"])
def test_updates_are_received_in_any_sequence(
    cell: MakeCell, monkeypatch: pytest.MonkeyPatch, fuse: str
) -> None:
    arguments = ("method=ULATDEC", "clients=4", "partition=quantity_skew", f"trainer.fuse={fuse}")
    plain = outcome(cell(*arguments))
    exchange = processes.Processes.exchange

    def shuffled(transport: Any, broadcasts: Any) -> Iterator[Update]:
        updates = list(exchange(transport, broadcasts))
        yield from (updates[position] for position in (2, 0, 3, 1))

    monkeypatch.setattr(processes.Processes, "exchange", shuffled)
    assert outcome(cell(*arguments)) == plain


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_a_client_that_diverges_in_a_worker_ends_the_cell(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The clients of this process do nothing, so that none of them diverges."""
    monkeypatch.setattr(Site, "update", lambda site, broadcast: None)
    arguments = [*SMALL, "clients=3", "optimizer.lr=1e30", "trainer.workers=2"]
    assert command(*arguments) == 1
    assert "loss of client 0 became nan in round 1" in capfd.readouterr().err


def begun(folder: Path) -> subprocess.Popen[str]:
    """A cell in a process and a session of its own that has just started a worker."""
    command = [warm_python(), "-m", "fedlight.run", *LONG]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not workers_of(fork_of(process.pid)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def started(folder: Path) -> subprocess.Popen[str]:
    """A cell in a process of its own that has its first round behind it and a worker beside it."""
    process = begun(folder)
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/long/*/checkpoint/server-r0001-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while not workers_of(fork_of(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The outcome of the cell where nothing disturbs it."""
    return ended_well(tmp_path_factory.mktemp("quiet"))


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
@pytest.mark.parametrize("more", [["clients=4"], ["clients=8", "trainer.fuse=2"]], ids=["alone", "fused"])
def test_what_a_killed_worker_was_doing_is_done_again(
    cell: MakeCell, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """After the third worker is lost the cell goes on alone."""
    arguments = ["method=UDEC", "epochs=4", "rounds=6", *more]
    alone = outcome(cell(*arguments))
    submit = processes.LokyPool._submit
    killed: list[int] = []

    def strike(pool: Any, task: Any, *arguments: Any) -> Any:
        future = submit(pool, task, *arguments)
        if task is not processes.prepare and len(killed) < 5:
            worker = workers_of(os.getpid())[0]
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)
            while not future.done():
                time.sleep(0.01)
        return future

    monkeypatch.setattr(processes.LokyPool, "_submit", strike)
    assert outcome(cell(*arguments, "trainer.workers=2")) == alone
    lost = capfd.readouterr().err.count("a process that trains clients was killed")
    assert lost == processes.LOSSES
    assert len(killed) >= lost


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_workers_stay_for_the_next_cell_of_a_command_and_an_idle_one_that_is_killed_is_replaced(
    command: Callable[..., int], shares: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RoundLoop.run
    seen: list[list[int]] = []

    def watched(loop: RoundLoop) -> None:
        run(loop)
        seen.append(workers_of(os.getpid()))
        if len(seen) == 2:
            os.kill(seen[1][0], signal.SIGKILL)

    monkeypatch.setattr(RoundLoop, "run", watched)
    assert command("-m", *SMALL, "clients=4", "trainer.workers=2", "seed=1,2,3") == 0
    first, second, third = seen
    assert len(first) == len(third) == 1
    assert first == second != third
    assert not workers_of(os.getpid())
    assert sum(shares) >= len(shares) == 6


@pytest.mark.slow
def test_a_signal_ends_the_cell_and_its_workers(tmp_path: Path, quiet: tuple[Any, ...]) -> None:
    process = started(tmp_path)
    workers = workers_of(fork_of(process.pid))
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from here" in err
    (path,) = tmp_path.glob("runs/long/*/result.json")
    assert json.loads(path.read_text())["status"] == "interrupted"
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert ended_well(tmp_path) == quiet


@pytest.mark.slow
@pytest.mark.parametrize(
    ("early", "number"),
    [
        pytest.param(True, signal.SIGTERM, id="ended as the workers begin"),
        pytest.param(False, signal.SIGKILL, id="killed in the second round"),
    ],
)
def test_nothing_is_left_of_a_cell_that_was_killed(
    tmp_path: Path, quiet: tuple[Any, ...], early: bool, number: signal.Signals
) -> None:
    process = begun(tmp_path) if early else started(tmp_path)
    end_whole(process, number)
    assert ended_well(tmp_path) == quiet


SCORED = """
from fedlight.federation.transport import processes

def scores():
    import torch
    from fedlight.evaluation.extractor import Features
    from fedlight.evaluation.reference import Moments, Reference
    from fedlight.evaluation.scores import score
    seen = Features(torch.rand(80, 64), torch.rand(80, 10))
    return score(seen, Reference(seen, Moments.of(seen.values)))

print(processes.EXECUTOR_CACHE.get(1).submit(scores).result()["fid"])
processes.end_workers()
"""


@pytest.mark.slow
def test_a_worker_that_scored_leaves_nothing_behind_that_others_complain_of() -> None:
    done = subprocess.run([sys.executable, "-c", SCORED], capture_output=True, text=True, check=True)
    assert abs(float(done.stdout)) < 1e-6
    assert done.stderr == ""


def test_a_worker_whose_work_is_done_ends_by_itself() -> None:
    """What looks for its parent is not waited for."""
    worker = "import os; from fedlight.federation.transport.worker import begin; begin(os.getppid())"
    assert subprocess.run([sys.executable, "-c", worker], timeout=60).returncode == 0


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    worker = (
        "import os, time; from fedlight.federation.transport.worker import begin; "
        "begin(os.getppid()); print('begun', flush=True); time.sleep(10); print('left behind')"
    )
    starter = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", starter, worker]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.kill()
        assert process.stdout.read() == ""  # the worker has the other end of the pipe


def test_an_idle_worker_obeys_a_signal_that_ends_it_even_where_its_parent_does_not() -> None:
    processes.end_workers()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a new process inherits
    try:
        worker = processes.EXECUTOR_CACHE.get(1).submit(os.getpid).result()
    finally:
        signal.signal(signal.SIGTERM, before)
    os.kill(worker, signal.SIGTERM)
    signalled = time.monotonic()
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() - signalled < 5
        time.sleep(0.05)
    processes.end_workers()


def test_a_worker_that_loky_lost_sight_of_ends_with_the_others() -> None:
    executor = processes.EXECUTOR_CACHE.get(2)
    worker = executor.submit(os.getpid).result()
    assert worker in workers_of(os.getpid())
    executor._processes.clear()
    processes.end_workers()
    assert not workers_of(os.getpid())
