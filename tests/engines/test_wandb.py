"""A Weights & Biases that refuses, hangs or dies stops no cell."""

import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from wandb_file import read_wandb

from fedlight.runs import record

CELL = [*SMALL, "logger=wandb", "clients=2", "data.limit=40", "evaluation.grid=0"]
KEY = "0123456789" * 4  # of the right form


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes W&B go online to the given address, with a key of the right form."""
    import wandb

    wandb.teardown()  # whose settings are those of the process's first run

    def go(address: str) -> None:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "4")
        monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "4")

    yield go
    wandb.teardown()


@pytest.fixture
def server() -> Iterator[Callable[[Callable[[Any], None]], str]]:
    """Starts a server on this machine that answers every request as told; returns its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[Any], None]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                answer(self)

            do_GET = do_POST  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        servers[-1].daemon_threads = True
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for running in servers:
        running.shutdown()


def refuse(request: Any) -> None:
    request.send_response(401)
    request.end_headers()


def hang(request: Any) -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(None, id="unreachable", marks=pytest.mark.slow),
        pytest.param(refuse, id="wrong key"),
        pytest.param(hang, id="hangs", marks=pytest.mark.slow),
    ],
)
def test_a_service_that_cannot_be_used_stops_no_cell(
    answer: Callable[[Any], None] | None,
    online: Callable[[str], None],
    server: Callable[[Callable[[Any], None]], str],
    command: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    online(server(answer) if answer else "http://127.0.0.1:9")
    begun = time.monotonic()
    assert command(*CELL) == 0
    assert time.monotonic() - begun < 60
    said = capfd.readouterr()
    assert "offline instead" in said.err
    assert KEY not in said.out + said.err
    assert len(list(tmp_path.glob("runs/default/*/wandb/offline-run-*/run-*.wandb"))) == 1


@pytest.mark.slow
def test_a_service_killed_in_mid_run_stops_no_cell(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = record.Record.note
    killed = []

    def note(self: record.Record, done: dict[str, Any], *rest: Any) -> None:
        noted(self, done, *rest)
        children = ["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"]
        for pid in subprocess.run(children, capture_output=True, text=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
            killed.append(pid)

    monkeypatch.setattr(record.Record, "note", note)
    assert command(*CELL) == 0
    assert killed
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert command(*CELL, "seed=1") == 0
    assert len(list(tmp_path.glob("runs/default/*-s1-*/wandb/offline-run-*/run-*.wandb"))) == 1


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment that `wandb agent` gives to the command that it starts."""
    import wandb

    wandb.teardown()  # whose settings are those of the process's first run
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc12345")
    monkeypatch.setenv("WANDB_RUN_ID", "run00001")
    yield
    wandb.teardown()


def runs_in(sweep: Path) -> set[tuple[str, str, str, str]]:
    """Id, group, name and sweep of the runs in W&B's own files."""
    return {
        (record.run.run_id, record.run.run_group, record.run.display_name, record.run.sweep_id)
        for path in sweep.glob("*/wandb/offline-run-*/run-*.wandb")
        for record in read_wandb(path)
        if record.WhichOneof("record_type") == "run"
    }


def test_a_single_cell_is_the_run_of_the_agent_that_started_it(
    agent: None, command: Callable[..., int], tmp_path: Path
) -> None:
    assert command("-m", *CELL, "rounds=0") == 0
    ((run, _, _, sweep),) = runs_in(tmp_path / "runs" / "default")
    assert (run, sweep) == ("run00001", "abc12345")


def test_every_cell_of_a_grid_under_an_agent_is_a_run_of_its_own_in_the_group_of_the_agents_sweep(
    agent: None, command: Callable[..., int], tmp_path: Path
) -> None:
    assert command("-m", *CELL, "rounds=0", "seed=1,2") == 0
    runs = runs_in(tmp_path / "runs" / "default")
    cells = {path.parent.name for path in tmp_path.glob("runs/default/*/result.json")}
    own = {cell: hashlib.blake2b(f"default/{cell}".encode(), digest_size=8).hexdigest() for cell in cells}
    assert len(cells) == 2
    assert runs == {(own[cell], "abc12345", cell, "") for cell in cells}  # the ids are those without an agent
    assert os.environ["WANDB_RUN_ID"] == "run00001"
    assert "FEDLIGHT_WANDB_GROUP" not in os.environ
