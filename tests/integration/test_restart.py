"""A cell that is killed, damaged or starved of disk ends as if nothing had happened."""

import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Cell, invoke
from forkserver import warm_python
from wandb_file import history_of

from fedlight.experiment import background, round_loop
from fedlight.federation import journal
from fedlight.federation.checkpoint import ClientMemory, ServerCheckpoint
from fedlight.federation.federator import Federator
from fedlight.federation.journal import Journal
from fedlight.federation.mechanism import GaussianMechanism
from fedlight.federation.server import Server
from fedlight.federation.site import Site
from fedlight.privacy.account import Account
from fedlight.runs import clock, record
from fedlight.runtime.signals import EXIT

CELL = [*SMALL, "data.limit=60", "clients=3", "rounds=3", "evaluation.every=1", "evaluation.grid=2"]
UPDATES = 9  # local updates of such a cell
SEED = 11  # decides where the cells are killed
MORE_KILLS = 4  # beside one at each kind of instant
TIMES = ("seconds",)  # columns that differ between any two runs

INSTANTS = [
    (Federator, "on_fit_start"),
    (Federator, "on_train_batch_end"),
    (ClientMemory, "write"),
    (Journal, "add"),  # after it: the update is written, and not yet acknowledged
    (Site, "update"),
    (Server, "receive"),
    (GaussianMechanism, "finish"),  # draws the noise of a round
    (Server, "finish_round"),  # after it: aggregated, and not yet stored
    (round_loop, "evaluate_models"),
    (ServerCheckpoint, "write"),
    (record.Record, "note"),
    (record, "write_result"),
    (os, "fsync"),  # inside a file that is written whole
]
"""Before and after each call of these a cell may be killed."""
BACKGROUND_INSTANTS = [
    (background.BackgroundEvaluation, "start"),  # before it: the round is stored, without its scores
    (background.BackgroundEvaluation, "collect"),  # after it: the scores are there, and not yet stored
    (record.Record, "amend"),
]
"""Likewise, where rounds are evaluated in the background."""


class Runner:
    """Runs a cell in a process of its own and logs each local update that it begins."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.arguments = [*CELL, f"output={folder}", *arguments]
        self.log = folder.with_name(f"{folder.name}.log")

    def start(self, stop_at: int | None = None, by: int = signal.SIGKILL, kill_at: int | None = None) -> int:
        """Returns the process.

        Args:
            stop_at: the process gets a signal when this local update has begun, counted from 1.
            by: that signal.
            kill_at: the process is killed at this instant, counted from 0; all are logged in `.instants`.
        """
        child = os.fork()
        if child:
            return child
        begun = Federator.on_fit_start
        count = 0

        def on_fit_start(self: Federator, trainer: Any, module: Any) -> None:
            nonlocal count
            count += 1
            with log.open("a") as file:
                file.writelines(f"{self._round} client {client}\n" for client in self._clients)
            if count == stop_at:
                os.kill(os.getpid(), by)
            begun(self, trainer, module)

        log = self.log
        Federator.on_fit_start = on_fit_start  # type: ignore[method-assign]
        journal.FLUSH = 0.0  # so that the instants do not depend on the clock
        watch_instants(self.log.with_suffix(".instants"), kill_at)
        status = 99
        try:
            with self.log.with_suffix(".err").open("a") as err:
                sys.stderr = err
                status = invoke(*self.arguments)
        finally:
            os._exit(status)

    def run(self, stop_at: int | None = None, by: int = signal.SIGKILL, kill_at: int | None = None) -> int:
        """Runs to the end; returns the exit status, or minus the signal that ended the process."""
        _, status = os.waitpid(self.start(stop_at, by, kill_at), 0)
        return os.waitstatus_to_exitcode(status)

    @property
    def instants(self) -> list[str]:
        """The kind of each instant of the run, in order."""
        return self.log.with_suffix(".instants").read_text().splitlines()

    @property
    def updates(self) -> Counter[str]:
        """How often each local update, by round and client, was begun."""
        return Counter(self.log.read_text().splitlines()) if self.log.exists() else Counter()

    @property
    def err(self) -> str:
        return self.log.with_suffix(".err").read_text()

    @property
    def cell(self) -> Cell:
        (path,) = self.folder.glob("*/*/config.yaml")
        return Cell(path.parent)

    @property
    def checkpoint(self) -> Path:
        return self.cell.folder / "checkpoint"


def watch_instants(log: Path, kill_at: int | None) -> None:
    """Logs every instant of `INSTANTS`, and kills this process at the given one."""
    file = log.open("w", buffering=1)
    count = 0

    def pass_by(what: str) -> None:
        nonlocal count
        file.write(what + "\n")
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def watched(what: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            pass_by(f"before {what}")
            found = act(*given, **named)
            pass_by(f"after {what}")
            return found

        return call

    for owner, name in [*INSTANTS, *BACKGROUND_INSTANTS]:
        setattr(owner, name, watched(f"{owner.__name__}.{name}", getattr(owner, name)))


def outcome(cell: Cell) -> dict[str, Any]:
    """All that must not differ between two runs of a cell."""
    result = cell.result
    for key in ("seconds", "memory", "error"):
        del result[key]
    tables = {
        name: [{key: row[key] for key in row if key not in TIMES} for row in cell.rows(name)]
        for name in ("rounds.csv", "ledger.csv", "partition.csv")
    }
    pictures = {path.name: path.read_bytes() for path in cell.folder.glob("samples/*.png")}
    return {"result": result, **tables, **pictures}


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs a cell in this process, so that the forks need not load what is loaded only by a cell."""
    folder = tmp_path_factory.mktemp("loaded")
    assert invoke(*CELL, "method=UDEC", "rounds=1", f"output={folder}") == 0
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The outcome of a cell that nothing disturbed, and its instants."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def run(*arguments: str) -> dict[str, Any]:
        if arguments not in known:
            runner = Runner(tmp_path_factory.mktemp("quiet") / "cell", *arguments)
            assert runner.run() == 0, runner.err
            known[arguments] = {"outcome": outcome(runner.cell), "instants": runner.instants}
            known[arguments]["updates"] = sum(runner.updates.values())
        return known[arguments]

    return run


def kill_points(instants: list[str], seed: int) -> list[int]:
    """One instant of each kind, and some more, chosen by a seed."""
    choose = random.Random(seed)
    kinds: dict[str, list[int]] = {}
    for number, kind in enumerate(instants):
        kinds.setdefault(kind, []).append(number)
    points = {choose.choice(numbers) for numbers in kinds.values()}
    return sorted(points | set(choose.sample(range(len(instants)), MORE_KILLS)))


@pytest.mark.slow
def test_a_cell_killed_at_any_instant_ends_the_same(
    tmp_path: Path, quiet: Callable[..., dict[str, Any]]
) -> None:
    arguments = ["method=UDEC", "transform=best", "clients=2", "rounds=2"]
    expected = quiet(*arguments)
    instants = expected["instants"]
    assert expected["updates"] == 4
    named = {kind.split(maxsplit=1)[1] for kind in instants}
    assert named == {f"{owner.__name__}.{name}" for owner, name in INSTANTS} - {"GaussianMechanism.finish"}
    for point in kill_points(instants, SEED):
        print(f"killed at instant {point} of {len(instants)}, {instants[point]}")
        runner = Runner(tmp_path / f"kill{point}", *arguments)
        assert runner.run(kill_at=point) == -signal.SIGKILL
        assert runner.run() == 0, runner.err
        assert outcome(runner.cell) == expected["outcome"]
        repeated = sum(runner.updates.values()) - expected["updates"]
        assert 0 <= repeated <= 1, runner.updates
        shutil.rmtree(runner.folder)


FUSED = ["method=UDEC", "trainer.fuse=2", "clients=3", "rounds=2", "partition=quantity_skew", "epochs=1"]
FUSED += ["partition.beta=5", "data.batch_size=16", "algorithm=localadam", "evaluation.every=null"]
OF_A_GROUP = re.compile(r"\w+ (Federator|ClientMemory|Journal|Site)\.")


@pytest.mark.slow
def test_a_cell_of_fused_clients_killed_at_any_instant_ends_the_same(
    tmp_path: Path, quiet: Callable[..., dict[str, Any]]
) -> None:
    """A group of which some clients are done trains again as a whole, and the others get the same bits."""
    expected = quiet(*FUSED)
    instants = expected["instants"]
    fits = [kind for kind in instants if kind == "before Federator.on_fit_start"]
    assert expected["updates"] == 6 > len(fits), "some clients are fused, and not all of them"
    points = [point for point in kill_points(instants, SEED) if OF_A_GROUP.match(instants[point])]
    assert len({instants[point] for point in points}) == 10
    for point in points:
        runner = Runner(tmp_path / f"kill{point}", *FUSED)
        assert runner.run(kill_at=point) == -signal.SIGKILL
        assert runner.run() == 0, runner.err
        assert outcome(runner.cell) == expected["outcome"], f"killed {instants[point]} (instant {point})"
        assert 0 <= sum(runner.updates.values()) - expected["updates"] <= 2, runner.updates
        shutil.rmtree(runner.folder)


@pytest.mark.slow
def test_a_cell_evaluated_in_the_background_ends_as_one_in_the_foreground_whenever_it_is_killed(
    tmp_path: Path, quiet: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between two stored rounds leaves an evaluation undone; it is done again, here or beside."""
    monkeypatch.setattr(sys, "executable", warm_python())  # of the process that evaluates
    arguments = ["method=UDEC", "clients=2", "evaluation.samples=65", "epochs=1"]
    expected, beside = quiet(*arguments)["outcome"], "evaluation.background=true"
    whole = Runner(tmp_path / "whole", *arguments, beside)
    assert whole.run() == 0, whole.err
    assert outcome(whole.cell) == expected
    instants = whole.instants
    assert Counter(instants)["after BackgroundEvaluation.collect"] == 2  # of three rounds
    for number, (owner, name) in enumerate([*BACKGROUND_INSTANTS, (ServerCheckpoint, "write")]):
        kind = f"{random.Random(number).choice(('before', 'after'))} {owner.__name__}.{name}"
        runner = Runner(tmp_path / f"kill{number}", *arguments, beside)
        point = random.Random(SEED).choice([i for i, passed in enumerate(instants) if passed == kind])
        assert runner.run(kill_at=point) == -signal.SIGKILL
        if number % 2:
            runner.arguments.remove(beside)
        assert runner.run() == 0, runner.err
        assert outcome(runner.cell) == expected, kind
        shutil.rmtree(runner.folder)


PRIVATE = ["data.limit=8", "clients=2", "rounds=2", "evaluation.every=null", "evaluation.grid=0"]
PRIVATE += ["privacy=client", "privacy.noise=0.1", "privacy.clip_quantile=0.5"]
OF_A_RELEASE = ("Server.receive", "GaussianMechanism.finish", "Server.finish_round", "ServerCheckpoint.write")


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True], ids=["seeded", "secure"])
def test_a_private_round_that_is_done_again_never_counts_for_less_than_was_released(
    secure: bool, tmp_path: Path
) -> None:
    """Seeded noise is the same again, and nothing further is released; secure noise is another release."""
    arguments = [*PRIVATE, f"privacy.secure_noise={str(secure).lower()}"]
    quiet = Runner(tmp_path / "quiet", *arguments)
    assert quiet.run() == 0, quiet.err
    epsilons = [Account(0.1, 1, 1e-5).epsilon(releases) for releases in range(5)]
    for kind in (f"after {what}" for what in OF_A_RELEASE):
        point = random.Random(kind).choice([i for i, passed in enumerate(quiet.instants) if passed == kind])
        runner = Runner(tmp_path / f"kill{point}", *arguments)
        assert runner.run(kill_at=point) == -signal.SIGKILL
        passed = Counter(runner.instants)
        assert runner.run() == 0, runner.err
        passed += Counter(runner.instants)
        found = runner.cell.result["privacy"]["epsilon"]
        if secure:
            drawn, begun = (passed[f"{when} GaussianMechanism.finish"] for when in ("after", "before"))
            assert epsilons[drawn] <= found <= epsilons[begun], kind
        else:
            assert outcome(runner.cell) == outcome(quiet.cell), kind
            assert found == epsilons[2]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A UDEC cell stopped in its third round, two local updates into it."""
    runner = Runner(tmp_path_factory.mktemp("stopped") / "runs", "method=UDEC")
    assert runner.run(stop_at=9) == -signal.SIGKILL
    return runner


def deleted(path: Path) -> None:
    path.unlink()


def bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(len(content))
    content[place] ^= 1 << (place % 8)
    path.write_bytes(content)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_checkpoint_holds_what_a_restart_needs_and_nothing_older(stopped: Runner) -> None:
    names = Counter(name.rsplit("-", 1)[0] for name in files(stopped.checkpoint))
    assert names == Counter(
        [
            *("server-r0001", "server-r0002"),
            *(f"clients/{client:06d}/r{round_:04d}" for client in range(3) for round_ in (1, 2)),
            *("clients/000000/r0003", "clients/000001/r0003"),
            "updates/r0003",
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("damage", [bit_flipped, deleted])
def test_damage_to_any_file_is_noticed_and_changes_nothing(
    damage: Callable[[Path], None],
    stopped: Runner,
    tmp_path: Path,
    quiet: Callable[..., dict[str, Any]],
) -> None:
    for number, name in enumerate(files(stopped.checkpoint)):
        runner = Runner(tmp_path / f"damage{number}", "method=UDEC")
        shutil.copytree(stopped.folder, runner.folder)
        damage(runner.checkpoint / name)
        assert runner.run() == 0, runner.err
        assert outcome(runner.cell) == quiet("method=UDEC")["outcome"], name
        message = Path(name).name in runner.err or Path(name).name.rpartition("-")[0] in runner.err
        not_needed = "r0001-" in name or name.startswith(("clients/000000/r0002", "clients/000001/r0002"))
        deleted_updates = name.startswith("updates/") and damage is deleted
        assert message == (not not_needed and not deleted_updates), (name, runner.err)
        shutil.rmtree(runner.folder)


@pytest.mark.slow
def test_a_file_of_another_cell_is_not_taken(
    stopped: Runner, tmp_path: Path, quiet: Callable[..., dict[str, Any]]
) -> None:
    other = Runner(tmp_path / "other", "method=UDEC", "seed=1")
    assert other.run(stop_at=9) == -signal.SIGKILL
    runner = Runner(tmp_path / "runs", "method=UDEC")
    shutil.copytree(stopped.folder, runner.folder)
    for path in runner.checkpoint.glob("server-r0002-*"):
        path.unlink()
    (foreign,) = other.checkpoint.glob("server-r0002-*")
    shutil.copy(foreign, runner.checkpoint)
    assert runner.run() == 0
    assert "belongs to another cell" in runner.err
    assert outcome(runner.cell) == quiet("method=UDEC")["outcome"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_cell_cleanly(
    number: signal.Signals, tmp_path: Path, quiet: Callable[..., dict[str, Any]]
) -> None:
    runner = Runner(tmp_path / "runs", "method=UDEC")
    assert runner.run(stop_at=5, by=number) == EXIT + number
    asked = runner.log.stat().st_mtime
    assert time.time() - asked < 5
    assert runner.cell.result["status"] == "interrupted"
    assert number.name in runner.cell.result["error"]
    assert "the same command goes on from here" in runner.err
    assert runner.run() == 0
    assert outcome(runner.cell) == quiet("method=UDEC")["outcome"]
    assert sum(runner.updates.values()) <= UPDATES + 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own of the given size in KiB, which may grow."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kibibytes: int) -> Path:
        again = "remount," if folder.is_mount() else ""
        option = f"{again}size={kibibytes}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder], check=True)
        return folder

    yield resize
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kibibytes", [40, 200, 500, 1300, 2100])
def test_a_full_disk_is_told_and_waited_out(
    kibibytes: int,
    small_disk: Callable[[int], Path],
    quiet: Callable[..., dict[str, Any]],
) -> None:
    runner = Runner(small_disk(kibibytes) / "runs", "method=UDEC")
    runner.log = small_disk(kibibytes).with_name("full.log")
    assert runner.run() in (1, 2)
    assert "No space left on device" in runner.err
    assert runner.err.count("fedlight: error") == 1
    small_disk(64 * 1024)
    assert runner.run() == 0, runner.err
    assert outcome(runner.cell) == quiet("method=UDEC")["outcome"]


@pytest.mark.slow
def test_the_offline_run_of_a_cell_that_was_stopped_is_one_and_whole(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "runs", "method=UDEC", "logger=wandb")
    command = [warm_python(), "-m", "fedlight.run", *runner.arguments]
    own = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    child = subprocess.Popen(command, env=own)
    while child.poll() is None and not list(runner.folder.glob("*/*/checkpoint/server-r0002-*")):
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    subprocess.run(command, env=own, check=True)
    (run,) = runner.cell.folder.glob("wandb/offline-run-*/run-*.wandb")
    history = history_of(run)
    assert [row["round"] for row in history if "train_loss" in row] == [1, 2, 3]
    assert sum("samples" in key for row in history for key in row) == 3


@pytest.mark.slow
def test_the_time_before_a_kill_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "EVERY", 0.0)
    runner = Runner(tmp_path / "runs", "method=FULL", "evaluation.every=null", "evaluation.grid=0")
    assert runner.run(stop_at=3) == -signal.SIGKILL
    (kept,) = tmp_path.glob("runs/*/*/.clock.json")
    spent = json.loads(kept.read_text())
    assert spent["round"] == 0
    assert 0 < spent["training"] < spent["total"]
    kept.write_text(json.dumps({"round": 0, "total": 5000, "training": 2000}))  # as if it had taken longer
    assert runner.run() == 0
    first, *others = (float(row["seconds"]) for row in runner.cell.rows("rounds.csv"))
    assert 2000 < first < 3000 > 100 * max(others)
    assert 2000 < runner.cell.result["seconds"]["training"] < 3000
    assert 5000 < runner.cell.result["seconds"]["total"] < 6000
    assert not kept.exists()


def test_a_finished_cell_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runner = Runner(tmp_path / "runs", "method=FULL", "rounds=1")
    assert runner.run() == 0
    before = {path: path.stat().st_mtime_ns for path in runner.folder.rglob("*")}
    assert runner.run() == 0
    assert {path: path.stat().st_mtime_ns for path in runner.folder.rglob("*")} == before
    assert "done already" in capfd.readouterr().out


def test_a_failed_cell_is_tried_again(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "runs", "method=FULL", "rounds=1", "optimizer.lr=1e30")
    assert runner.run() == 1
    assert json.loads(runner.cell.folder.joinpath("result.json").read_text())["status"] == "failed"
    updates = sum(runner.updates.values())
    assert runner.run() == 1
    assert sum(runner.updates.values()) > updates
