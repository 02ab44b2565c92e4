"""Clients on Dask's workers: the bits of one process, whoever is killed."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import SMALL, Cell
from distributed import Client, LocalCluster

from fedlight.federation.algorithms.fedavg import FedAvg

MakeCell = Callable[..., Cell]
SKEWED = ["method=UDEC", "clients=4", "partition=quantity_skew", "rounds=3"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[1, 3])
def workers(request: pytest.FixtureRequest) -> Iterator[Client]:
    """A scheduler that runs already, and has one worker or three."""
    with (
        LocalCluster(
            n_workers=request.param,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            memory_limit=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def at(client: Client) -> list[str]:
    """What is typed to use its workers."""
    return ["transport=dask", f"transport.address={client.scheduler.address}"]


def outcome(cell: Cell) -> tuple[Any, ...]:
    result = cell.result
    tables = [cell.rows("ledger.csv"), [{**row, "seconds": ""} for row in cell.rows("rounds.csv")]]
    return result["cell"], result["state_sha256"], result["client_sha256"], tables


@pytest.mark.parametrize(
    "arguments",
    [
        ["method=FULL", "clients=5", "fraction=0.6", "rounds=3"],
        ["method=USPLIT", "clients=5", "federation.dropout=0.3", "rounds=3"],
        ["method=UDEC", "clients=4", "partition=quantity_skew"],
        ["algorithm=scaffold", "method=ULATDEC", "clients=4", "fraction=0.5", "rounds=3"],
        ["transform=int4", "method=FULL", "clients=4", "fraction=0.5", "rounds=3"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_workers_give_the_bits_of_one_process(cell: MakeCell, workers: Client, arguments: list[str]) -> None:
    alone = outcome(cell(*arguments, "transport=inline"))
    assert outcome(cell(*arguments, *at(workers))) == alone


class Broken(FedAvg):
    """An algorithm of a user's that fails at one client."""

    def callbacks(self, received: Any, memory: Any) -> Any:
        raise ZeroDivisionError("there is nothing to divide by")


def test_a_failure_names_client_and_round(
    command: Callable[..., int], workers: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    few = [*SMALL, "clients=1", *at(workers)]
    assert command(*few, "optimizer.lr=1e30") == 1
    assert "loss of client 0 became nan in round 1" in capfd.readouterr().err
    assert command(*few, "+algorithm.name=broken", "+algorithm._target_=test_dask.Broken") == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "client 0 failed in round 1: ZeroDivisionError: there is nothing to divide by" in line


def test_an_address_without_a_scheduler_is_bad_input(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedlight.federation.transport.dask_workers.ANSWER", 0.5)
    assert command(*SMALL, "transport=dask", "transport.address=tcp://127.0.0.1:1") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("transport.address: no scheduler of Dask answers at tcp://127.0.0.1:1")
