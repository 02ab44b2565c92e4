"""Sweeps on a real SLURM: whatever happens to their jobs, the results are those of a quiet run."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, missing, until
from conftest import invoke

from fedlight.runtime.lock import read_holder

GRID = ["-m", "method=FULL,UDEC", "clients=2,3", "name=grid"]
TINY = ["data.limit=40", "rounds=10", "epochs=1", "evaluation.steps=2", "evaluation.grid=0", "logger=none"]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.mem_gb=1"]

Typed = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    started = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the grid's cells come to where nothing happens: {cell: hashes}."""
    folder = tmp_path_factory.mktemp("quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert invoke(*GRID, *TINY) == 0
    return results(folder)


def results(folder: Path) -> dict[str, Any]:
    """The hashes of the completed cells of the grid."""
    found = [json.loads(path.read_text()) for path in folder.glob("runs/grid/*/result.json")]
    done = [result for result in found if result["status"] == "completed"]
    return {result["cell"]: (result["state_sha256"], result["client_sha256"]) for result in done}


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Types `python -m MODULE ARGUMENTS` in `tmp_path` on the cluster's login node."""

    def call(module: str, *arguments: str) -> "subprocess.Popen[str]":
        root = str(Path(__file__).parents[1])
        environment = {**os.environ, **cluster.environment, "PYTHONPATH": root}
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return call


def end(process: "subprocess.Popen[str]", status: int = 0) -> str:
    """Waits for a command, which must exit with `status`; returns its stdout."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == status, out + err
    return out


Start = Callable[..., "subprocess.Popen[str]"]


def test_a_sweep_is_left_alone_cancelled_and_retried(
    start: Start, tmp_path: Path, quiet: dict[str, Any]
) -> None:
    def states() -> dict[str, str]:
        cells = json.loads(end(start("fedlight.sweeps", "status", "runs/grid", "--json")))
        return {cell["cell"]: cell["state"] for cell in cells}

    began = time.monotonic()
    typed = [*GRID, *TINY, *SLURM]
    assert "4 cells submitted" in end(start("fedlight.run", *typed, "hydra.launcher.detach=true"))
    assert time.monotonic() - began < 20
    until(lambda: sorted(states().values()) == ["queued", "queued", "running", "running"])
    assert "already, as job" in end(start("fedlight.run", *typed, "hydra.launcher.detach=true"))

    assert "4 jobs cancelled" in end(start("fedlight.sweeps", "cancel", "runs/grid"))
    until(lambda: not {"queued", "running"} & set(states().values()))
    out = end(start("fedlight.sweeps", "retry", "runs/grid", "hydra.launcher.detach=false"))
    assert "4 cells submitted" in out
    assert set(states().values()) == {"done"}
    assert results(tmp_path) == quiet
    assert "runs/grid: 4 cells" in out

    began = time.monotonic()
    assert end(start("fedlight.run", *typed)).count("done already") == 4
    assert time.monotonic() - began < 20


def test_preempted_killed_and_timed_out_the_sweep_completes_by_itself(
    cluster: Cluster, start: Start, tmp_path: Path, quiet: dict[str, Any]
) -> None:
    sweep = tmp_path / "runs" / "grid"
    limits = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=1"]
    launched = start("fedlight.run", *GRID, *TINY, *SLURM, *limits, "hydra.launcher.cpus_per_task=1")
    until(lambda: list(sweep.glob(".plan/*.json")) and len(jobs(sweep)) == 4, seconds=60)
    node = {job: cluster.ask("squeue", "-h", "-j", job, "-o", "%N") for job in jobs(sweep).values()}
    until(lambda: all(cluster.ask("squeue", "-h", "-j", job, "-o", "%N").strip() for job in node))
    where = {
        cell: cluster.ask("squeue", "-h", "-j", job, "-o", "%N").strip() for cell, job in jobs(sweep).items()
    }
    requeued, killed = (cell for cell in where if where[cell] == "n1")
    preempted, late = (cell for cell in where if where[cell] == "n2")

    at_work(sweep / late)
    process = read_holder(sweep / late)[0].pid
    os.kill(process, signal.SIGSTOP)
    at_work(sweep / preempted)
    cluster.ask("scancel", "--signal=USR2", jobs(sweep)[preempted])
    at_work(sweep / requeued)
    cluster.ask("scontrol", "requeue", jobs(sweep)[requeued])
    at_work(sweep / killed)
    cluster.kill_node("n1")
    cluster.start_node("n1")
    until(lambda: is_pending(process, signal.SIGUSR2), seconds=150)
    os.kill(process, signal.SIGCONT)

    out = end(launched)
    assert results(tmp_path) == quiet, out
    for cell, job in jobs(sweep).items():
        log = sweep / ".slurm" / job / f"{job}_0_log"
        assert log.with_suffix(".out").read_text().count("Starting with JobEnvironment") >= 2, cell
        assert "at work already" not in log.with_suffix(".err").read_text()


def jobs(sweep: Path) -> dict[str, str]:
    """Cell: its job."""
    (plan,) = sweep.glob(".plan/*.json")
    cells = json.loads(plan.read_text())["cells"].items()
    return {cell: planned["job"] for cell, planned in cells if planned["job"]}


def at_work(cell: Path) -> None:
    """Waits until the first round of a cell is done."""

    def rounds() -> int:
        try:
            with (cell / "rounds.csv").open() as file:
                return len(list(csv.DictReader(file)))
        except FileNotFoundError:
            return 0

    until(rounds, seconds=120)


def is_pending(process: int, sent: signal.Signals) -> bool:
    """Whether a signal waits for a process that is stopped."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(status["ShdPnd"], 16) & 1 << sent - 1)
