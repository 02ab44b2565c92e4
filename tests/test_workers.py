"""Clients that train at once, in several processes: the bits of one after another, whatever happens."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Cell, helpers_of
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fedlight import run, workers
from fedlight.config import validate
from fedlight.experiment import build as parts

MakeCell = Callable[..., Cell]
LONG = [*SMALL, "name=long", "method=UDEC", "clients=4", "rounds=3", "epochs=4", "trainer.workers=2"]


@pytest.fixture(scope="module", autouse=True)
def no_helper_is_left() -> Iterator[None]:
    yield
    workers.dismiss()


@pytest.fixture(autouse=True)
def shares(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks helpers did in each round; cells of this process wait until their helpers are there."""
    noted: list[int] = []
    train, get_ready = workers.Crew.train, workers.Crew.get_ready

    def counting(crew: workers.Crew, *given: Any) -> Any:
        theirs = train(crew, *given)
        noted.append(len(theirs))
        return theirs

    def patient(crew: workers.Crew, *given: Any) -> None:
        get_ready(crew, *given)
        wait(crew._ready)

    monkeypatch.setattr(workers.Crew, "train", counting)
    monkeypatch.setattr(workers.Crew, "get_ready", patient)
    return noted


def outcome(cell: Cell) -> tuple[Any, ...]:
    result = cell.result
    tables = [cell.rows("ledger.csv"), [{**row, "seconds": ""} for row in cell.rows("rounds.csv")]]
    return result["cell"], result["state_sha256"], result["client_sha256"], result["fid"], tables


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["method=UDEC", "clients=4", "evaluation.samples=100"],
        ["method=USPLIT", "clients=5", "federation.dropout=0.3", "rounds=3"],
        ["method=FULL", "clients=6", "fraction=0.5", "model.ema_decay=0.9", "rounds=3"],
        ["method=LOCAL", "clients=3", "partition=label_skew"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_two_processes_give_the_bits_of_one(cell: MakeCell, shares: list[int], arguments: list[str]) -> None:
    alone = outcome(cell(*arguments, "trainer.workers=1"))
    assert not shares
    assert outcome(cell(*arguments, "trainer.workers=2")) == alone
    assert sum(shares) >= len(shares) > 1


@pytest.mark.slow
def test_any_number_of_workers_trains_a_round(cell: MakeCell, shares: list[int]) -> None:
    cells = [cell("method=USPLIT", "clients=4", f"trainer.workers={n}") for n in (1, 3, 9)]
    assert outcome(cells[0]) == outcome(cells[1]) == outcome(cells[2])
    assert sum(shares[:2]) >= 4  # two of three processes
    assert sum(shares[2:]) >= 6  # three of four, since there are no more clients


def test_the_cores_are_shared_by_workers_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "CORES", 8)
    monkeypatch.delenv("FEDLIGHT_WORKERS", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def count(device: torch.device, *overrides: str) -> int:
        with initialize_config_dir(str(run.ROOT / "configs"), version_base="1.3"):
            return parts.worker_count(validate(compose("config", ["clients=20", *overrides])), device)

    run.register_resolvers()
    assert [count(cpu), count(cpu, "trainer.threads=3"), count(cpu, "trainer.threads=null")] == [8, 2, 1]
    assert [count(gpu), count(gpu, "trainer.workers=4"), count(cpu, "trainer.workers=30")] == [1, 4, 20]
    assert [count(cpu, "clients=5"), count(cpu, "fraction=0.1"), count(cpu, "method=CENTRAL")] == [5, 2, 1]


def test_a_client_that_diverges_in_a_helper_ends_the_cell(
    command: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "clients=3", "optimizer.lr=1e30", "trainer.workers=2"]
    assert command(*arguments) == 1
    assert "became nan in round 1" in capfd.readouterr().err


def started(folder: Path) -> subprocess.Popen[str]:
    """A cell in a process of its own that has its first round behind it and a helper beside it."""
    command = [sys.executable, "-m", "fedlight.run", *LONG]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/long/*/checkpoint/global-r0001-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while not helpers_of(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def ended_well(folder: Path) -> tuple[Any, ...]:
    subprocess.run([sys.executable, "-m", "fedlight.run", *LONG], cwd=folder, check=True)
    (path,) = folder.glob("runs/long/*/result.json")
    return outcome(Cell(path.parent))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The outcome of the cell where nothing disturbs it."""
    return ended_well(tmp_path_factory.mktemp("quiet"))


@pytest.mark.slow
def test_the_cell_goes_on_without_a_helper_that_was_killed(tmp_path: Path, quiet: tuple[Any, ...]) -> None:
    process = started(tmp_path)
    os.kill(helpers_of(process.pid)[0], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 0
    (path,) = tmp_path.glob("runs/long/*/result.json")
    assert outcome(Cell(path.parent)) == quiet


@pytest.mark.slow
def test_what_a_killed_helper_was_doing_is_done_here(
    cell: MakeCell, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["method=UDEC", "clients=4", "epochs=4", "rounds=6"]
    alone = outcome(cell(*arguments))
    submit = workers.ProcessPoolExecutor.submit
    killed: list[Any] = []

    def strike(pool: Any, act: Any, *given: Any) -> Any:
        future = submit(pool, act, *given)
        if act is workers._update and not killed:
            killed.extend(multiprocessing.active_children())
            for child in killed:
                child.kill()
        return future

    monkeypatch.setattr(workers.ProcessPoolExecutor, "submit", strike)
    assert outcome(cell(*arguments, "trainer.workers=2")) == alone
    assert killed
    assert capfd.readouterr().err.count("a process that trains clients was killed") == 1


@pytest.mark.slow
def test_the_next_cell_of_a_command_has_helpers_again(tmp_path: Path) -> None:
    run.register_resolvers()
    with initialize_config_dir(str(run.ROOT / "configs"), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", ["logger=none"]), resolve=True)
    crew = workers.Crew(1)
    crew.get_ready(tmp_path, config)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(workers.BrokenProcessPool):
        crew._pool.submit(int).result()
    crew.get_ready(tmp_path, config)
    assert crew._ready[0].exception() is None
    crew.end()


@pytest.mark.slow
def test_a_signal_ends_the_cell_and_its_helpers(tmp_path: Path, quiet: tuple[Any, ...]) -> None:
    process = started(tmp_path)
    helpers = helpers_of(process.pid)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from here" in err
    (path,) = tmp_path.glob("runs/long/*/result.json")
    assert json.loads(path.read_text())["status"] == "interrupted"
    assert not any(Path(f"/proc/{helper}").exists() for helper in helpers)
    assert ended_well(tmp_path) == quiet


@pytest.mark.slow
def test_helpers_end_with_the_process_that_they_help(tmp_path: Path, quiet: tuple[Any, ...]) -> None:
    process = started(tmp_path)
    helpers = helpers_of(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{helper}").exists() for helper in helpers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ended_well(tmp_path) == quiet
