"""A search whose process is killed goes on; a new trial starts as soon as a place is free."""

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from cluster import until
from forkserver import warm_python
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

ROOT = Path(__file__).parents[2]
TINY = ["data.limit=40", "clients=2", "epochs=1", "evaluation.grid=0", "evaluation.samples=0", "logger=none"]
SEARCH = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.metric=train_loss", *TINY]
LR = "optimizer.lr=tag(log,interval(1e-4,1e-2))"

Start = Callable[..., "subprocess.Popen[str]"]

pytestmark = pytest.mark.slow  # they train cells, and start processes to be killed


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Types `python -m fedlight.run ARGUMENTS`; what still runs at the end is killed."""
    started = []

    def call(*arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [warm_python(), "-m", "fedlight.run", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()


def end(process: "subprocess.Popen[str]") -> str:
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    return out


def summary(sweep: Path) -> dict[str, Any]:
    return json.loads((sweep / "search.json").read_text())


def records(sweep: Path) -> int:
    """Number of lines in the journal."""
    journal = sweep / ".search" / "journal.log"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def completed(sweep: Path) -> dict[Path, int]:
    """The results of the completed cells, and when each was written."""
    paths = sweep.glob("*/result.json")
    return {path: path.stat().st_mtime_ns for path in paths if '"completed"' in path.read_text()}


def trials(sweep: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(sweep / ".search" / "journal.log")))
    (study,) = storage.get_all_studies()
    return storage.get_all_trials(study._study_id)


def test_a_search_that_is_killed_again_and_again_has_the_trials_of_an_undisturbed_one(
    start: Start, tmp_path: Path
) -> None:
    typed = [
        *SEARCH,
        LR,
        "method=FULL,UDEC",
        "rounds=3",
        "hydra.sweeper.n_trials=7",
        "hydra.sweeper.n_jobs=1",
    ]
    typed += ["hydra.sweeper.seeds=[1,2]", "hydra.sweeper.prune_every=2"]
    end(start(*typed, "name=quiet"))
    draw, sweep, before = random.Random(36), tmp_path / "runs" / "killed", {}
    for lines in (1, 2, 3, 5, 9, 14):
        process = start(*typed, "name=killed")
        until(lambda: records(sweep) >= lines or process.poll() is not None, seconds=120)  # noqa: B023
        with_delay = draw.uniform(0, 0.6)
        try:
            process.wait(with_delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert before.items() <= completed(sweep).items()  # no cell was trained again
        before = completed(sweep)
    end(start(*typed, "name=killed"))
    assert before.items() <= completed(sweep).items()
    assert summary(sweep) == summary(tmp_path / "runs" / "quiet")
    assert len(summary(sweep)["trials"]) == 7


def test_trials_start_while_a_long_one_runs_and_none_is_lost_or_repeated_after_a_kill(
    start: Start, tmp_path: Path
) -> None:
    """With this seed the first trial has 40 rounds, and those after it one each."""
    typed = [*SEARCH, LR, "rounds=1,40", "hydra.sweeper.seed=147", "hydra.sweeper.n_trials=6", "name=search"]
    typed += ["hydra.sweeper.n_jobs=2", "hydra/launcher=local", "hydra.launcher.n_jobs=2", "data.limit=120"]
    sweep = tmp_path / "runs" / "search"
    process = start(*typed)

    def ended() -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in trials(sweep) if trial.state.is_finished()] if records(sweep) else []

    until(lambda: len(ended()) >= 2, seconds=240)
    process.send_signal(signal.SIGKILL)  # its workers end their cells
    process.wait()
    before, cells = {trial.number: trial for trial in ended()}, completed(sweep)
    end(start(*typed))
    after = trials(sweep)
    assert [trial.params["rounds"] for trial in after] == ["40", "1", "1", "1", "1", "1"]
    assert {trial.number: trial for trial in after if trial.number in before} == before
    assert cells.items() <= completed(sweep).items()
    assert [trial.state.name for trial in after] == ["COMPLETE"] * 6

    long, *short = after
    during = [trial for trial in short if trial.datetime_complete < long.datetime_complete]
    assert len(during) >= 2  # a batch of two trials has one beside the long one
    for trial, cell in zip(after, summary(sweep)["trials"], strict=True):
        result = json.loads((sweep / cell["cells"][0] / "result.json").read_text())
        assert (result["status"], result["train_loss"]) == ("completed", trial.value)
