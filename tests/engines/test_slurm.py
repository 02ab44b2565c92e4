"""Sweeps on a real SLURM: whatever happens to their jobs, the results are those of a quiet run."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, missing, until
from conftest import invoke, workers_of
from forkserver import warm_python

from fedlight.runtime.lease import read_holder

DEMO = ["-m", "sweeps=demo", "name=grid", "method=USPLIT,UDEC", "clients=2,5,6"]  # six cells
GRID = ["-m", "method=FULL,UDEC", "clients=2,3", "name=grid"]
TINY = ["data.limit=40", "rounds=10", "epochs=1", "evaluation.steps=2"]
TINY += ["evaluation.grid=0", "evaluation.samples=0", "logger=none"]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.mem_gb=1"]

Start = Callable[..., "subprocess.Popen[str]"]

pytestmark = pytest.mark.slow


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
    """What the cells come to where nothing happens: {cell: hashes}."""
    folder = tmp_path_factory.mktemp("quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert invoke(*DEMO, *TINY) == invoke(*GRID, *TINY) == 0
    return results(folder)


def results(folder: Path) -> dict[str, Any]:
    """The hashes of the completed cells of the grid."""
    found = [json.loads(path.read_text()) for path in folder.glob("runs/grid/*/result.json")]
    done = [result for result in found if result["status"] == "completed"]
    return {result["cell"]: (result["state_sha256"], result["client_sha256"]) for result in done}


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Iterator[Start]:
    """Types `python -m MODULE ARGUMENTS` in `tmp_path` on the login node; its jobs end with the test."""

    def call(module: str, *arguments: str) -> "subprocess.Popen[str]":
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, **cluster.environment, "PYTHONPATH": root}
        return subprocess.Popen(
            [warm_python(), "-m", module, *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    yield call
    cluster.ask("scancel", "--user=root")
    until(lambda: not cluster.ask("squeue", "-h"), seconds=60)


def end(process: "subprocess.Popen[str]", status: int = 0) -> str:
    """Waits for a command, which must exit with `status`; returns its stdout."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == status, out + err
    return out


def test_a_sweep_is_left_alone_cancelled_and_retried(
    start: Start, tmp_path: Path, quiet: dict[str, Any]
) -> None:
    def states() -> dict[str, str]:
        cells = json.loads(end(start("fedlight.sweeps", "status", "runs/grid", "--json")))
        return {cell["cell"]: cell["state"] for cell in cells}

    typed = [*DEMO, *TINY, *SLURM, "hydra.launcher.detach=true"]
    assert "6 cells submitted" in end(start("fedlight.run", *typed, "hydra.launcher.array_parallelism=1"))
    assert len(results(tmp_path)) < 6
    until(lambda: {"queued", "running"} <= set(states().values()), seconds=90)
    out = end(start("fedlight.run", *typed))
    assert out.count("with SLURM already, as job") + out.count("done already") == 6
    assert "submitted" not in out

    assert "jobs cancelled" in end(start("fedlight.sweeps", "cancel", "runs/grid"))
    until(lambda: not {"queued", "running"} & set(states().values()), seconds=90)
    again = ["hydra.launcher.detach=false", "hydra.launcher.array_parallelism=4"]
    out = end(start("fedlight.sweeps", "retry", "runs/grid", *again))
    assert "cells submitted" in out
    assert "runs/grid: 6 cells" in out
    assert list(states().values()) == ["done"] * 6
    ends = results(tmp_path)
    assert len(ends) == 6
    assert ends.items() <= quiet.items()

    assert end(start("fedlight.run", *typed)).count("done already") == 6


def test_preempted_killed_and_timed_out_the_sweep_completes_by_itself(
    cluster: Cluster, start: Start, tmp_path: Path, quiet: dict[str, Any]
) -> None:
    sweep = tmp_path / "runs" / "grid"
    limits = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=1"]
    launched = start("fedlight.run", *GRID, *TINY, *SLURM, *limits, "hydra.launcher.cpus_per_task=1")
    until(lambda: len(jobs(sweep)) == 4, seconds=60)

    def cells_of(node: str) -> list[str]:
        running = cluster.ask("squeue", "-h", "-r", "-t", "R", "-w", node, "-o", "%i").split()
        return [cell for cell, job in jobs(sweep).items() if job in running]

    until(lambda: len(cells_of("n1")) == len(cells_of("n2")) == 2)
    requeued, killed = cells_of("n1")
    preempted, late = cells_of("n2")

    at_work(sweep / late)
    os.kill(read_holder(sweep / late)[0].pid, signal.SIGSTOP)  # so that its time runs out
    at_work(sweep / preempted)
    cluster.ask("scancel", "--signal=USR2", jobs(sweep)[preempted])
    at_work(sweep / requeued)
    cluster.ask("scontrol", "requeue", jobs(sweep)[requeued])
    at_work(sweep / killed)
    cluster.kill_node("n1")
    time.sleep(25)  # a node that is back sooner is not asked for jobs of less than 20 seconds
    cluster.start_node("n1")
    until(lambda: "this job is timed-out" in log(sweep, jobs(sweep)[late], "err"), seconds=150)

    out = end(launched)
    ends = results(tmp_path)
    assert len(ends) == 4, out
    assert ends.items() <= quiet.items()
    for cell, job in jobs(sweep).items():
        assert log(sweep, job, "out").count("Starting with JobEnvironment") >= 2, cell
        assert " in use by " not in log(sweep, job, "err")


def test_a_preempted_job_whose_clients_train_at_once_goes_on(
    cluster: Cluster, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tmp_path / "runs" / "grid"
    work = ["-m", "method=UDEC", "clients=4", "name=grid", *TINY, "data.limit=240", "epochs=8", "rounds=6"]
    launched = start("fedlight.run", *work, *SLURM, "trainer.workers=2")
    until(lambda: jobs(sweep), seconds=60)
    ((cell, job),) = jobs(sweep).items()
    at_work(sweep / cell)
    holder = read_holder(sweep / cell)
    assert holder is not None
    until(lambda: workers_of(holder[0].pid), seconds=60)
    cluster.ask("scancel", "--signal=USR2", job)
    end(launched)
    assert log(sweep, job, "out").count("Starting with JobEnvironment") == 2

    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    assert invoke(*work) == 0
    assert results(tmp_path) == results(tmp_path / "alone")
    assert len(results(tmp_path)) == 1


def test_a_job_of_two_nodes_trains_on_both_and_survives_a_power_cut_and_preemption(
    cluster: Cluster, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tmp_path / "runs" / "grid"
    work = ["-m", "method=UDEC", "clients=4", "name=grid", *TINY, "data.limit=240", "epochs=8", "rounds=14"]
    many = ["hydra.launcher.nodes=2", "transport=dask", "transport.workers=1"]
    launched = start("fedlight.run", *work, *SLURM, *many)
    until(lambda: jobs(sweep), seconds=60)
    ((cell, job),) = jobs(sweep).items()
    at_work(sweep / cell, seconds=300)
    assert dask_workers(cluster) == {"n1", "n2"}

    def starts() -> int:
        return log(sweep, job, "out").count("Starting with JobEnvironment")

    host = cluster.ask("squeue", "-h", "-j", job, "-o", "%B").strip()
    (other,) = {"n1", "n2"} - {host}
    before = rounds_of(sweep / cell)
    cluster.kill_node(other)
    until(lambda: rounds_of(sweep / cell) >= before + 2, seconds=120)
    assert dask_workers(cluster) == {host}
    assert starts() == 1

    update = ("scontrol", "update", f"nodename={other}")
    cluster.ask(*update, "state=down", "reason=power")  # as after SlurmdTimeout
    cluster.start_node(other)
    cluster.ask(*update, "state=resume")
    until(lambda: starts() == 2 and dask_workers(cluster) == {"n1", "n2"}, seconds=120)
    before = rounds_of(sweep / cell)
    until(lambda: rounds_of(sweep / cell) > before, seconds=120)
    cluster.ask("scancel", "--signal=USR2", job)
    end(launched)
    assert starts() == 3
    until(lambda: not dask_workers(cluster))

    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    assert invoke(*work) == 0
    assert results(tmp_path) == results(tmp_path / "alone")
    assert len(results(tmp_path)) == 1


def dask_workers(cluster: Cluster) -> set[str]:
    """The nodes on which workers of Dask run."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            own = (process / "environ").read_bytes().decode().split("\0")
            if (
                f"SLURM_CONF={cluster.folder}/slurm.conf" in own
                and b"dask_worker" in (process / "cmdline").read_bytes()
            ):
                found |= {value.partition("=")[2] for value in own if value.startswith("SLURMD_NODENAME=")}
    return found


def jobs(sweep: Path) -> dict[str, str]:
    """Cell: its job."""
    plans = [json.loads(path.read_text()) for path in sweep.glob(".plan/[!.]*.json")]
    cells = [item for plan in plans for item in plan["cells"].items()]
    return {cell: planned["job"] for cell, planned in cells if planned["job"]}


def log(sweep: Path, job: str, stream: str) -> str:
    """What a job wrote."""
    return (sweep / ".slurm" / job / f"{job}_0_log.{stream}").read_text()


def rounds_of(cell: Path) -> int:
    """How many rounds of a cell are done."""
    try:
        with (cell / "rounds.csv").open() as file:
            return len(list(csv.DictReader(file)))
    except FileNotFoundError:
        return 0


def at_work(cell: Path, seconds: float = 120) -> None:
    """Waits until the first round of a cell is done."""
    until(lambda: rounds_of(cell), seconds)


def test_longer_cells_wait_in_the_queue_for_the_shorter_ones_that_they_go_on_from(
    start: Start, tmp_path: Path
) -> None:
    few = [argument for argument in TINY if argument != "rounds=10"]
    grid = ["-m", "method=UDEC", "clients=2", "rounds=2,1", "name=grid", *few, *SLURM]
    out = end(start("fedlight.run", *grid, "hydra.launcher.detach=true"))
    assert out.count("1 cells submitted") == 2  # an array each, of which the second one depends on the first
    until(lambda: len(results(tmp_path)) == 2, seconds=400)
    shorter, longer = sorted(results(tmp_path), key=lambda cell: "-R2-" in cell)
    result = json.loads((tmp_path / "runs" / "grid" / longer / "result.json").read_text())
    assert (result["parent"]["cell"], result["parent"]["rounds"]) == (shorter, 1)


def test_a_search_over_seeds_uses_both_nodes_and_goes_on_after_its_command_was_killed(
    cluster: Cluster, start: Start, tmp_path: Path
) -> None:
    sweep = tmp_path / "runs" / "grid"
    search = ["-m", "hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "method=UDEC"]
    search += ["hydra.sweeper.metric=train_loss", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2"]
    search += ["hydra.sweeper.seeds=[1,2]", "hydra.sweeper.prune_every=5", "clients=2", "name=grid"]

    def nodes() -> set[str]:
        return set(cluster.ask("squeue", "-h", "-t", "R", "-o", "%N").split())

    launched = start("fedlight.run", *search, *TINY, *SLURM)
    until(lambda: nodes() == {"n1", "n2"}, seconds=120)
    launched.kill()  # its jobs stay with SLURM
    launched.communicate()
    out = end(start("fedlight.run", *search, *TINY, *SLURM))
    assert "best of 3: train_loss" in out

    summary = json.loads((sweep / "search.json").read_text())
    losses = {
        path.parent.name: json.loads(path.read_text())["train_loss"] for path in sweep.glob("*/result.json")
    }
    assert len(losses) == 12  # trials, seeds, and two numbers of rounds
    assert set(jobs(sweep)) == losses.keys()
    assert len(list(sweep.glob(".slurm/[0-9]*_*"))) == 12  # no cell had a second job
    for trial in summary["trials"]:
        assert trial["state"] == "complete"
        assert trial["value"] == pytest.approx(sum(losses[cell] for cell in trial["cells"]) / 2)
        assert [cell.split("-")[5:8:2] for cell in trial["cells"]] == [["R10", "s1"], ["R10", "s2"]]
    assert summary["best"]["value"] == min(trial["value"] for trial in summary["trials"])
