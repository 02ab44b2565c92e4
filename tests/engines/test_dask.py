"""Clients on Dask's workers: the bits of one process, whoever is killed."""

import asyncio
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from heapq import heapreplace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from conftest import SMALL, Cell
from distributed import Client, LocalCluster, Worker
from distributed.cfexecutor import ClientExecutor
from distributed.cli.dask_worker import main as dask_worker
from endings import end_whole, ended_well, outcome
from forkserver import warm_python
from pretrained import save_pretrained
from toy import PARTIAL, toy_context, toy_setup, toy_site

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import Broadcast, Evaluation
from fedlight.federation.server import Server
from fedlight.federation.site import Site
from fedlight.federation.transport.dask import Dask
from fedlight.federation.transport.dask_workers import WorkerSetup, started
from fedlight.federation.transport.tasks import Written, write
from fedlight.federation.transport.worker import SIGNALS

MakeCell = Callable[..., Cell]
LONG = ["method=UDEC", "clients=4", "epochs=8", "rounds=3"]


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """Workers and nannies of this process begin with their libraries loaded."""
    before = sys.executable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python())
        multiprocessing.set_executable(warm_python())
        yield
    multiprocessing.set_executable(before)


@pytest.fixture(scope="module")
def workers() -> Iterator[Client]:
    """A scheduler that runs already, and has three workers; Dask's configuration holds its TLS keys."""
    with started(3, gpus=0) as (client, _):
        yield client


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What the long cell comes to where nothing disturbs it."""
    return ended_well(tmp_path_factory.mktemp("quiet"), [*SMALL, *LONG, "name=long", "transport=inline"])


def at(client: Client) -> list[str]:
    """What is typed to use its workers."""
    return ["transport=dask", f"transport.address={client.scheduler.address}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["method=FULL", "clients=5", "fraction=0.6", "rounds=3"],
        ["method=USPLIT", "clients=5", "federation.dropout=0.3", "rounds=3"],
        ["method=UDEC", "clients=4", "partition=quantity_skew"],
        ["algorithm=scaffold", "method=ULATDEC", "clients=4", "fraction=0.5", "rounds=3"],
        ["transform=int4", "method=FULL", "clients=4", "fraction=0.5", "rounds=3"],
        ["trainer.fuse=2", "method=UDEC", "clients=7", "algorithm=scaffold", "federation.dropout=0.2"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_workers_give_the_bits_of_one_process(cell: MakeCell, workers: Client, arguments: list[str]) -> None:
    alone = outcome(cell(*arguments, "transport=inline"))
    assert outcome(cell(*arguments, *at(workers))) == alone


@pytest.mark.slow
def test_workers_train_adapters_to_the_bits_of_one_process(
    cell: MakeCell, workers: Client, tmp_path: Path
) -> None:
    pretrained = f"finetuning.pretrained={save_pretrained(tmp_path / 'pretrained')}"
    arguments = ["finetuning=lora", pretrained, "finetuning.rank=[1,2,3]", "clients=3", "method=UDEC"]
    alone = outcome(cell(*arguments, "algorithm=flexlora", "transport=inline"))
    assert outcome(cell(*arguments, "algorithm=flexlora", *at(workers))) == alone


@pytest.mark.slow
def test_a_skewed_round_takes_hardly_longer_than_it_must(
    cell: MakeCell, workers: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a round of 20 clients on four workers, of whom whoever is free takes the next that comes."""
    begun: list[int] = []

    def note(group: tuple[Broadcast, ...]) -> list[Written]:
        begun.extend(broadcast.client for broadcast in group)
        return write(group)

    monkeypatch.setattr("fedlight.federation.transport.dask.write", note)
    skewed = ["clients=20", "partition=quantity_skew", "partition.beta=1.5", "data.batch_size=8", "rounds=1"]
    skewed += ["data.limit=1000"]
    images = [0] * 20
    for row in cell(*skewed, *at(workers)).rows("partition.csv"):
        images[int(row["client"])] += int(row["count"])
    assert sorted(begun) == list(range(20))
    assert sum(images) == 1000

    def finish(sequence: Iterable[int]) -> int:
        free = [0] * 4
        for client in sequence:
            heapreplace(free, free[0] + -(-images[client] // 8))
        return max(free)

    steps = sum(-(-count // 8) for count in images)
    must = max(steps / 4, -(-max(images) // 8))
    assert finish(begun) <= 1.1 * must
    assert finish(reversed(begun)) > 1.1 * must


class Broken(FedAvg):
    """An algorithm of a user's that fails at one client."""

    def callbacks(self, *arguments: Any) -> Any:
        raise ZeroDivisionError("there is nothing to divide by")


@pytest.mark.slow
def test_a_failure_names_client_and_round(
    command: Callable[..., int], workers: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    few = [*SMALL, "clients=1", *at(workers)]
    assert command(*few, "optimizer.lr=1e30") == 1
    assert "loss of client 0 became nan in round 1" in capfd.readouterr().err
    assert command(*few, "+algorithm.name=broken", "+algorithm._target_=test_dask.Broken") == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "client 0 failed in round 1: ZeroDivisionError: there is nothing to divide by" in line


@pytest.mark.slow
def test_an_address_without_a_scheduler_is_bad_input(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedlight.federation.transport.dask_workers.ANSWER", 0.5)
    assert command(*SMALL, "transport=dask", "transport.address=tcp://127.0.0.1:1") == 2
    error_line = capfd.readouterr().err
    assert (
        "fedlight: error: transport.address: no scheduler of Dask answers at tcp://127.0.0.1:1\n"
        in error_line
    )


@pytest.mark.slow
def test_a_round_whose_worker_is_killed_gives_the_same_bits(
    cell: MakeCell, quiet: tuple[Any, ...], workers: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ClientExecutor.submit
    begun, killed = 0, []

    def strike(executor: ClientExecutor, *arguments: Any, **more: Any) -> Any:
        nonlocal begun
        future = submit(executor, *arguments, **more)
        begun += 1
        if begun == 6:  # in the second round
            while not (busy := [address for address, tasks in workers.processing().items() if tasks]):
                time.sleep(0.01)
            ((_, worker),) = workers.run(os.getpid, workers=busy[:1]).items()
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)
        return future

    monkeypatch.setattr(ClientExecutor, "submit", strike)
    assert outcome(cell(*LONG, *at(workers))) == quiet
    assert len(killed) == 1


@pytest.mark.slow
def test_a_cell_whose_scheduler_is_killed_goes_on_with_another(
    command: Callable[..., int],
    quiet: tuple[Any, ...],
    workers: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"]
    scheduler = subprocess.Popen(
        [*program, "--host=127.0.0.1", "--port=0", "--scheduler-file=other"], stderr=subprocess.DEVNULL
    )
    program = [sys.executable, "-m", "distributed.cli.dask_worker", "--no-dashboard", "--nthreads=1"]
    worker = subprocess.Popen([*program, "--scheduler-file=other"], stderr=subprocess.DEVNULL)
    receive = Server.receive

    def strike(server: Server, update: Any) -> None:
        if update.round == 2:
            scheduler.kill()
        receive(server, update)

    try:
        found = tmp_path / "other"
        while not (found.exists() and found.read_text().endswith("}")):
            time.sleep(0.1)
        address = json.loads(found.read_text())["address"]
        with monkeypatch.context() as patch:
            patch.setattr(Server, "receive", strike)
            lost = [*SMALL, "name=lost", *LONG]
            capfd.readouterr()
            assert command(*lost, "transport=dask", f"transport.address={address}") == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert "the scheduler is gone; the same command continues" in line
    finally:
        scheduler.kill()
        worker.terminate()
        worker.wait(30)
    assert command(*lost, *at(workers)) == 0
    assert "goes on after round 1" in capfd.readouterr().err
    (path,) = tmp_path.glob("runs/lost/*/result.json")
    assert outcome(Cell(path.parent)) == quiet


@pytest.mark.slow
def test_our_own_workers_end_with_a_cell_that_is_killed(
    command: Callable[..., int], quiet: tuple[Any, ...], tmp_path: Path
) -> None:
    typed = [*SMALL, *LONG, "name=long", "transport=dask", "transport.workers=2"]
    asked = [sys.executable, "-m", "fedlight.run", *typed]
    process = subprocess.Popen(asked, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    begun = time.monotonic()
    while not list(tmp_path.glob("runs/long/*/checkpoint/server-r0001-*")):
        assert process.poll() is None
        assert time.monotonic() - begun < 200
        time.sleep(0.02)
    end_whole(process, signal.SIGKILL)
    assert command(*typed[:-2], "transport=inline") == 0
    (path,) = tmp_path.glob("runs/long/*/result.json")
    assert outcome(Cell(path.parent)) == quiet


def make_site(folder: Path) -> Site:
    return toy_site(toy_setup(PARTIAL), folder)


def test_one_task_a_worker_is_submitted_at_once(tmp_path: Path) -> None:
    make = partial(make_site, tmp_path)
    local: dict[str, Any] = {"threads_per_worker": 1, "processes": False}
    local |= {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}
    with LocalCluster(n_workers=2, **local) as cluster, ExitStack() as exit_stack:
        transport = Dask(
            toy_context(make(), make_site=make, exit_stack=exit_stack), address=cluster.scheduler_address
        )
        assert transport._pool.capacity() == 2
        requests = [Evaluation("toy", 1, client, 0, False, {}) for client in range(3)]
        assert [scores.client for scores in transport.evaluate(requests)] == [0, 1, 2]


def test_our_own_scheduler_is_for_this_machine_alone_and_shows_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no srun
    with started(0, gpus=0) as (client, _):
        scheduler = client.cluster.scheduler
        assert scheduler.address.startswith("tls://127.0.0.1:")
        assert not client.nthreads()
        assert "WorkerSetup" in {name.partition("-")[0] for name in scheduler.worker_plugins}
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"http://127.0.0.1:{scheduler.http_server.port}/")


def test_workers_on_nodes_have_all_memory_and_their_end_ends_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of srun is a program that notes what it is to start, and ends."""
    srun, typed = tmp_path / "srun", tmp_path / "typed"
    srun.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > '{typed}'\nexit 3\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    monkeypatch.setattr("fedlight.federation.transport.dask_workers.SETTLED", 0)
    begun = time.monotonic()
    with started(5, gpus=0) as (client, check):
        assert not client.nthreads()

        def go_on() -> None:
            while time.monotonic() - begun < 20:
                check()

        with pytest.raises(ConnectionError, match="the workers on the nodes ended, srun with status 3"):
            go_on()
        address = client.scheduler.address
    words = typed.read_text().splitlines()
    program, *options = words[words.index("-m") + 1 :]
    assert program == "distributed.cli.dask_worker"
    parsed = dask_worker.make_context(program, options).params
    expected = {"scheduler": address, "memory_limit": "0", "n_workers": "5", "nthreads": 1}
    assert {name: parsed[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "visible", "gpus", "found"),
    [
        (3, "", 2, "1"),  # on this machine
        ("0-1", "", 2, "1"),  # on a node, of several workers
        ("1-2", "4,5", 2, "4"),
        ("7", "4,5", 2, "5"),  # on a node, its only worker
        (1, "", 0, ""),
    ],
)
def test_a_worker_takes_a_gpu_of_its_node_and_hears_no_signal(
    name: str | int,
    visible: str,
    gpus: int,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    before = {number: signal.getsignal(number) for number in (getattr(signal, word) for word in SIGNALS)}

    async def make() -> Worker:
        return Worker("tcp://127.0.0.1:1", name=name, local_directory=str(tmp_path))

    try:
        WorkerSetup(gpus).setup(asyncio.run(make()))
        assert {signal.getsignal(number) for number in before} == {signal.SIG_IGN}
    finally:
        gc.enable()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == found
