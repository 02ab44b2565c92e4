"""Clients that train at once, in several processes: the bits of one after another, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future
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
from loky.process_executor import BrokenProcessPool

from fedlight import run
from fedlight.config import validate
from fedlight.experiment import cell as cell_module
from fedlight.experiment import setup
from fedlight.federation.messages import Evaluation, Update
from fedlight.federation.site import Site
from fedlight.federation.transport import processes, tasks
from fedlight.federation.transport.transport import TransportContext

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
    exchange, submit = processes.Processes.exchange, processes.Processes._submit

    def counting(transport: processes.Processes, broadcasts: Any) -> Iterator[Update]:
        theirs = 0

        def done() -> None:
            nonlocal theirs
            theirs += 1

        transport._context = replace(transport._context, done=done)
        yield from exchange(transport, broadcasts)
        if transport._workers:
            noted.append(theirs)

    def patient(transport: processes.Processes, act: Any) -> Any:
        future = submit(transport, act)
        if act is processes.prepare:
            future.exception()
        return future

    monkeypatch.setattr(processes.Processes, "exchange", counting)
    monkeypatch.setattr(processes.Processes, "_submit", patient)
    return noted


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["method=UDEC", "clients=4", "evaluation.samples=100"],
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
    monkeypatch.setattr(setup, "CORES", 8)
    monkeypatch.delenv("FEDLIGHT_WORKERS", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def room(device: torch.device, *overrides: str) -> int:
        with initialize_config_dir(str(run.ROOT / "configs"), version_base="1.3"):
            return setup.worker_room(validate(compose("config", ["clients=20", *overrides])), device)

    run.register_resolvers()
    assert [room(cpu), room(cpu, "trainer.threads=3"), room(cpu, "trainer.threads=null")] == [8, 2, 1]
    assert [room(gpu), room(gpu, "trainer.workers=4"), room(cpu, "trainer.workers=30")] == [1, 4, 30]


def test_there_are_no_more_workers_than_clients_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(processes.Processes, "_submit", lambda transport, act: asked.append(1))
    here: Any = None
    for cohort, room, workers, expected in ((5, 8, None, 4), (2, 8, None, 1), (1, 8, None, 0), (9, 2, 4, 3)):
        asked.clear()
        processes.Processes(TransportContext(here, here, cohort, room, here, here), workers)
        assert len(asked) == expected


class Pool:
    """In place of loky's: does a task at once, but for those with these numbers, at which a worker dies."""

    def __init__(self, deaths: Container[int]) -> None:
        self.deaths, self.count = deaths, 0

    def submit(self, act: Any, make_site: Callable[[], Any], task: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self.count in self.deaths:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(task(make_site()))
        self.count += 1
        return future


def answers_of(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, check: Callable[[], None] = lambda: None
) -> list[tuple[str, int]]:
    """Who answered the evaluations of six clients, as they come from this process and one worker."""
    monkeypatch.setattr(processes, "_executor", lambda workers: pool)
    here, there = (
        SimpleNamespace(evaluate=lambda request, place=place: (place, request.client))
        for place in ("here", "there")
    )
    context = TransportContext(here, lambda: there, 6, 2, lambda: None, check)
    requests = (Evaluation("cell", 1, client, 0, False, {}) for client in range(6))
    return list(processes.Processes(context).evaluate(requests))


def test_a_worker_has_two_tasks_while_this_process_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["there", "there", "here"] * 2
    assert answers_of(Pool(()), monkeypatch) == list(zip(places, range(6), strict=True))


def test_a_pool_that_broke_while_it_was_idle_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def submit(self, *_: Any) -> Future[Any]:
            raise BrokenProcessPool

    ended: list[int] = []
    here: Any = SimpleNamespace(evaluate=lambda request: request.client)
    monkeypatch.setattr(processes, "end_workers", lambda: ended.append(1))
    monkeypatch.setattr(processes, "_executor", lambda workers: Pool(()) if ended else Broken())
    transport = processes.Processes(TransportContext(here, lambda: here, 6, 2, lambda: None, lambda: None))
    requests = (Evaluation("cell", 1, client, 0, False, {}) for client in range(6))
    assert list(transport.evaluate(requests)) == list(range(6))
    assert ended == [1]


def test_what_workers_did_is_counted_as_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_executor", lambda workers: Pool(()))
    counted: list[int] = []
    here: Any = SimpleNamespace()
    transport = processes.Processes(TransportContext(here, lambda: here, 6, 2, lambda: None, lambda: None))
    jobs = [
        processes.Job(Evaluation("cell", 1, client, 0, False, {}), lambda _: "here", lambda *_: "there")
        for client in range(6)
    ]
    found = list(transport._run(jobs, lambda: counted.append(1)))
    assert found.count("there") == len(counted) == 4


@pytest.mark.parametrize(("deaths", "losses"), [({1}, 1), ({2}, 1), ({1, 3}, 2), (range(1, 99), 3)])
def test_what_a_worker_leaves_is_done_again_and_after_three_losses_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], deaths: Container[int], losses: int
) -> None:
    answers = answers_of(Pool(deaths), monkeypatch)
    assert [client for _, client in answers] == list(range(6))
    assert [place for place, _ in answers].count("there") > 0 or losses == 3
    assert capfd.readouterr().err.splitlines() == [processes.LOST] * losses


def test_a_signal_that_ended_a_worker_ends_the_cell_without_a_word_of_loss(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers_of(Pool({1}), monkeypatch, check)
    assert capfd.readouterr().err == ""


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
def test_updates_are_received_in_any_sequence(cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("method=ULATDEC", "clients=4", "partition=quantity_skew")
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
def test_what_a_killed_worker_was_doing_is_done_again(
    cell: MakeCell, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """After the third worker is lost the cell goes on alone."""
    arguments = ["method=UDEC", "clients=4", "epochs=4", "rounds=6"]
    alone = outcome(cell(*arguments))
    submit = processes.Processes._submit
    killed: list[int] = []

    def strike(transport: Any, act: Any) -> Any:
        future = submit(transport, act)
        if act is not processes.prepare and len(killed) < 5:
            worker = workers_of(os.getpid())[0]
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)
            while not future.done():
                time.sleep(0.01)
        return future

    monkeypatch.setattr(processes.Processes, "_submit", strike)
    assert outcome(cell(*arguments, "trainer.workers=2")) == alone
    lost = capfd.readouterr().err.count("a process that trains clients was killed")
    assert lost == processes.LOSSES
    assert len(killed) >= lost


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_workers_stay_for_the_next_cell_of_a_command_and_an_idle_one_that_is_killed_is_replaced(
    command: Callable[..., int], shares: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    federate = cell_module.Run.federate
    seen: list[list[int]] = []

    def watched(cell: cell_module.Run) -> None:
        federate(cell)
        seen.append(workers_of(os.getpid()))
        if len(seen) == 2:
            os.kill(seen[1][0], signal.SIGKILL)

    monkeypatch.setattr(cell_module.Run, "federate", watched)
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


def test_a_worker_makes_the_site_of_a_cell_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_site", None)
    made: list[str] = []

    def one() -> Any:
        made.append("one")
        return "site of one"

    def two() -> Any:
        made.append("two")
        return "site of two"

    seen = [tasks.act(make_site, lambda site: site) for make_site in (one, one, two, two, one)]
    assert made == ["one", "two", "one"]
    assert seen == [f"site of {name}" for name in ("one", "one", "two", "two", "one")]


SCORED = """
from fedlight.federation.transport import processes

def scores():
    import torch
    from fedlight.evaluation.extractor import Features
    from fedlight.evaluation.reference import Moments, Reference
    from fedlight.evaluation.scores import score
    seen = Features(torch.rand(80, 64), torch.rand(80, 10))
    return score(seen, Reference(seen, Moments.of(seen.values)))

print(processes._executor(1).submit(scores).result()["fid"])
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


def test_an_idle_worker_obeys_a_signal_that_ends_it_even_where_its_parent_does_not() -> None:
    processes.end_workers()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a new process inherits
    try:
        worker = processes._executor(1).submit(os.getpid).result()
    finally:
        signal.signal(signal.SIGTERM, before)
    os.kill(worker, signal.SIGTERM)
    asked = time.monotonic()
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() - asked < 5
        time.sleep(0.05)
    processes.end_workers()


def test_a_worker_that_loky_lost_sight_of_ends_with_the_others() -> None:
    executor = processes._executor(2)
    worker = executor.submit(os.getpid).result()
    assert worker in workers_of(os.getpid())
    executor._processes.clear()
    processes.end_workers()
    assert not workers_of(os.getpid())
