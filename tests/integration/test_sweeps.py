"""The cells of a sweep: its plan, how they stand, the grids that are offered."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cell
from forkserver import warm_python
from joblib import Parallel, delayed
from sweep_commands import DEAD, call
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from fedlight.federation import site
from fedlight.reporting.numbers import data_volume
from fedlight.runs.plan import Launch, PlannedCell
from fedlight.runs.reader import read_numbers
from fedlight.runtime.lease import HOLDER, acquire_lease
from fedlight.runtime.process_record import describe_this_process
from hydra_plugins.fedlight_sweeps.local import OnOneGPU

ROOT = Path(__file__).parents[2]
GRIDS = {path.stem: path for path in ROOT.glob("sweeps/*.yaml")}

Command = Callable[..., int]


def write(cell: Path, rounds: int = 0, holder: Any = None, **result: Any) -> None:
    """A cell's folder after so many rounds of two seconds each."""
    cell.mkdir(parents=True)
    rows = "".join(f"{number + 1},2.0\n" for number in range(rounds))
    (cell / "rounds.csv").write_text("round,seconds\n" + rows)
    if holder is not None:
        (cell / HOLDER).write_text(json.dumps(asdict(holder)))
    if result:
        exchange = {"params_total": 0, "bytes_total": 0}
        whole = {"schema": 1, "rounds": 5, "seed": 1, "exchange": exchange, "train_loss": None, "fid": None}
        whole |= {"seconds": {}, "versions": {}, "error": None}
        (cell / "result.json").write_text(json.dumps(whole | result))


def states(sweep: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """What `status --json` says of each cell."""
    capsys.readouterr()
    assert call("status", str(sweep), "--json") == 0
    return {cell["cell"]: cell for cell in json.loads(capsys.readouterr().out)}


def test_status_shows_the_state_of_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("over", "working", "stopped", "broken", "killed", "torn", "absent")
    Launch(["-m"], str(tmp_path), DEAD, {name: PlannedCell([], 5) for name in names}).write(tmp_path)
    write(tmp_path / "over", 5, status="completed")
    write(tmp_path / "working", 2, describe_this_process())
    write(tmp_path / "stopped", 1, status="interrupted", error="interrupted")
    write(tmp_path / "broken", 1, status="failed", error="the loss [of client 0] became nan")
    write(tmp_path / "killed", 1, DEAD)
    write(tmp_path / "torn", 1)
    (tmp_path / "torn" / "result.json").write_text('{"status": "comp')
    write(tmp_path / "typed_alone", 5, status="completed")
    cells = states(tmp_path, capsys)
    assert {name: cell["state"] for name, cell in cells.items()} == {
        "over": "done",
        "working": "running",
        "stopped": "interrupted",
        "broken": "failed",
        "killed": "interrupted",
        "torn": "corrupt",
        "absent": "missing",
        "typed_alone": "done",
    }
    working = cells["working"]
    assert (working["round"], working["rounds"]) == (2, 5)
    assert 4 < working["eta"] <= 6
    assert time.time() - working["heartbeat"] < 10
    assert call("status", str(tmp_path)) == 0
    table = capsys.readouterr().out
    assert "2 done, 1 running, 2 interrupted, 1 failed, 1 corrupt, 1 missing" in table
    assert "the loss [of client 0] became nan" in table


def test_what_a_living_process_has_yet_to_run_is_queued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "again", 1, status="failed")
    os.utime(tmp_path / "again" / "result.json", (0, 0))
    cells = {name: PlannedCell([], rounds=5) for name in ("again", "first", "never")}
    Launch(["-m"], str(tmp_path), describe_this_process(), cells).write(tmp_path)
    write(tmp_path / "first", 1, status="failed")
    found = {name: cell["state"] for name, cell in states(tmp_path, capsys).items()}
    assert found == {"again": "queued", "first": "failed", "never": "queued"}


def test_the_last_words_of_a_job_that_left_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Launch([], "", DEAD, {"cell": PlannedCell([], rounds=5, job="12_3")}).write(tmp_path)
    log = tmp_path / ".slurm" / "12_3" / "12_3_0_log.err"
    log.parent.mkdir(parents=True)
    log.write_text("submitit: noise\nfedlight: error: clients must be at most 40\nsrun: noise\n")
    cell = states(tmp_path, capsys)["cell"]
    assert (cell["state"], cell["job"], cell["error"]) == ("failed", "12_3", "clients must be at most 40")


def test_status_of_200_cells_takes_less_than_two_seconds_of_a_processor(tmp_path: Path) -> None:
    cells = {f"cell{number}": PlannedCell(["method=FULL"], rounds=5) for number in range(200)}
    Launch(["-m"], str(tmp_path), describe_this_process(), cells).write(tmp_path)
    for number, cell in enumerate(cells):
        write(tmp_path / cell, 5, describe_this_process() if number % 2 else None, status="completed")
        if number % 2:
            (tmp_path / cell / "result.json").unlink()
    before = os.times()
    command = [sys.executable, "-m", "fedlight.sweeps", "status", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    after = os.times()
    assert "200 cells: 100 done, 100 running" in done.stdout
    assert sum(after[2:4]) - sum(before[2:4]) < 2  # of children, user and system


def test_status_loads_nothing_heavy() -> None:
    heavy = "print([m for m in ('torch', 'hydra', 'pandas', 'wandb') if m in sys.modules])"
    code = f"import sys, fedlight.sweeps; {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["status", "retry", "cancel", "sync"])
def test_a_folder_that_is_no_sweep_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert call(command, str(tmp_path / "nowhere")) == 2
    assert re.fullmatch(r"fedlight: error: \S+ is no folder; .*\n", capsys.readouterr().err)
    Launch([], "", DEAD, {"cell": PlannedCell([], rounds=5)}).write(tmp_path / "demo")
    if command == "status":
        assert call(command, str(tmp_path)) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'demo'}: 1 cells: 1 missing\n"
    else:
        assert call(command, str(tmp_path)) == 2
        refusal = r"fedlight: error: \S+ is no sweep: .*; the sweeps in it: demo\n"
        assert re.fullmatch(refusal, capsys.readouterr().err)


SWEEP = ["-m", "method=FULL,UDEC", "clients=2", "name=grid"]
TINY = ["data.limit=40", "rounds=1", "epochs=1", "evaluation.steps=2"]
TINY += ["evaluation.grid=0", "evaluation.samples=0", "logger=none"]


@pytest.mark.slow
def test_retry_runs_what_is_not_done_and_nothing_else(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", warm_python())
    assert command(*SWEEP, *TINY) == 0
    results = {path: json.loads(path.read_text()) for path in tmp_path.glob("runs/grid/*/result.json")}
    done, broken = sorted(results)
    broken.write_text(json.dumps({**results[broken], "status": "failed"}))
    (plan,) = tmp_path.glob("runs/grid/.plan/*.json")
    content = json.loads(plan.read_text())
    assert list(content["cells"]) == [done.parent.name, broken.parent.name]
    plan.write_text(json.dumps({**content, "process": asdict(DEAD)}))
    written = done.stat().st_mtime_ns
    assert call("retry", "runs/grid") == 0
    assert done.stat().st_mtime_ns == written
    assert json.loads(broken.read_text())["state_sha256"] == results[broken]["state_sha256"]
    assert {cell["state"] for cell in states(Path("runs/grid"), capsys).values()} == {"done"}
    assert call("retry", "runs/grid") == 0
    assert capsys.readouterr().out == "nothing to retry; runs/grid: 2 cells: 2 done\n"


def test_cells_that_are_done_are_not_launched_again(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*SWEEP, *TINY, "rounds=0") == 0
    capsys.readouterr()
    assert command(*SWEEP, *TINY, "rounds=0", "clients=2,3") == 0
    out = capsys.readouterr().out
    assert out.count("done already") == 2
    assert "Launching 2 jobs" in out


@pytest.mark.parametrize(
    "installed", [["squeue", "sbatch", "srun"], []], ids=["without a cluster", "without SLURM"]
)
def test_where_no_slurm_answers_one_line_says_so(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    installed: list[str],
) -> None:
    for name in installed:
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho '{name}: error: no configuration' >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin" if installed else str(tmp_path / "bin"))
    assert command(*SWEEP, *TINY, "hydra/launcher=slurm") == 2
    assert capfd.readouterr().err == (
        "fedlight: error: hydra/launcher=slurm: squeue does not answer; is this a login node of SLURM?\n"
    )


@pytest.mark.slow
def test_a_dry_run_counts_what_the_cells_then_exchange_and_runs_nothing(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["method=USPLIT,UDEC", "-m", "name=grid", *TINY, "rounds=2", "clients=3", "fraction=0.7"]
    assert command("--dry", *grid) == 0
    assert list(tmp_path.iterdir()) == []
    error_line = capsys.readouterr().out
    assert command(*grid) == 0
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/grid/*/result.json")]
    assert len(results) == 2
    for result in results:
        volume = data_volume(result["exchange"]["bytes_total"])
        # two of three clients a round, each with a batch of 13 or 14 images
        assert re.search(rf"{result['cell']} +. missing . +4 . +{volume}", error_line), error_line
    capsys.readouterr()
    assert command("--dry", *grid) == 0
    assert "2 cells, 2 done\n" in capsys.readouterr().out


def test_a_dry_run_knows_conditional_models(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--dry", "-m", "method=FULL,UDEC_WARM", "model.conditional=true", *TINY, "clients=3") == 0
    error_line = capsys.readouterr().out
    assert re.search(r"cell +\S +state +\S +steps +\S +bytes +\S +time, about", error_line)
    assert "2 cells, 0 done; left: " in error_line


def test_a_cell_that_a_grid_names_twice_is_run_once(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("-m", "clients=2,2", "logger=none,csv", *TINY[:-1], "rounds=0") == 0
    assert "Launching 1 jobs" in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_sweep_loads_nothing_heavy(command: Command, tmp_path: Path) -> None:
    assert command(*SWEEP, *TINY, "rounds=0") == 0
    code = (
        f"import sys; sys.argv = {['run', *SWEEP, *TINY, 'rounds=0']}; from fedlight.run import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'lightning', 'pandas', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("done already") == 2
    assert done.stdout.strip().endswith("[]")


@pytest.mark.slow
def test_offline_runs_are_sent_by_wandb_and_what_is_not_sent_is_named(
    cell: Callable[..., Cell],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = cell("logger=wandb", "clients=2", "rounds=1", f"output={tmp_path / 'runs'}")
    (run,) = made.folder.glob("wandb/offline-run-*")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert call("sync", str(made.folder.parent)) == 2
    assert "http://127.0.0.1:9 cannot be reached from here" in capsys.readouterr().err
    (marker,) = (path.with_name(f"{path.name}.synced") for path in run.glob("*.wandb"))
    marker.touch()
    assert call("sync", str(made.folder.parent)) == 0
    assert "0 offline W&B runs sent, 1 had been before" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_on_one_machine_see_one_gpu_each(tmp_path: Path) -> None:
    def look(config: None) -> str:
        time.sleep(1)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    task = OnOneGPU(look, ("4", "7"), str(tmp_path))
    with Parallel(n_jobs=2) as parallel:
        assert sorted(parallel(delayed(task)(None) for _ in range(4))) == ["4", "4", "7", "7"]


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_a_grid_has_the_cells_that_it_promises(name: str) -> None:
    text = GRIDS[name].read_text()
    params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    cells = math.prod(len(str(values).split(",")) for values in params.values())
    assert re.search(rf"^# {name}: .*\?.* {cells} cells", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_a_grid_is_a_cell_that_can_be_run(command: Command, tmp_path: Path, name: str) -> None:
    small = ["rounds=0", "logger=none", "evaluation.grid=0", "data=digits", "data.only=null", "model=tiny"]
    params = yaml.safe_load(GRIDS[name].read_text())["hydra"]["sweeper"]["params"]
    first = [f"{key}={str(values).split(',')[0]}" for key, values in params.items()]
    assert command(f"sweeps={name}", *first, *small) == 0
    assert len(list(tmp_path.glob(f"runs/{name}/*/result.json"))) == 1


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_stopped_and_asks_for_the_same_cells(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.metric=train_loss", *TINY, "clients=2"]
    settings += ["optimizer.lr=tag(log,interval(1e-4,1e-2))", "method=FULL,UDEC"]

    def search(name: str, trials: int) -> dict[str, float]:
        assert command(*settings, f"name={name}", f"hydra.sweeper.n_trials={trials}") == 0
        results = (json.loads(path.read_text()) for path in tmp_path.glob(f"runs/{name}/*/result.json"))
        return {result["cell"]: result["train_loss"] for result in results}

    found = search("whole", 4)
    assert len(found) == 4
    assert f"best of 4: train_loss {min(found.values()):.4g} with method=" in capsys.readouterr().out
    assert len(search("parts", 2)) == 2
    ended = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/parts/*/result.json")}
    assert search("parts", 4) == found
    assert {path: path.stat().st_mtime_ns for path in ended} == ended


SEARCH = ["-m", "hydra/sweeper=optuna", "name=search", *TINY, "hydra.sweeper.n_jobs=1", "clients=2"]


def search_for(metric: str, *arguments: str, trials: int = 3) -> list[str]:
    return [*SEARCH, f"hydra.sweeper.metric={metric}", f"hydra.sweeper.n_trials={trials}", *arguments]


def test_a_trial_over_seeds_counts_by_the_mean_of_its_cells(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["epochs=1,2,3", "seed=1", "rounds=0", "hydra.sweeper.seeds=[4,6,11]"]
    assert command(*search_for("seed", *settings, trials=4)) == 0
    summary = json.loads((tmp_path / "runs" / "search" / "search.json").read_text())
    assert "best of 4: seed 7 with epochs=" in capsys.readouterr().out
    assert summary["best"]["value"] == 7.0
    cells = {path.name for path in tmp_path.glob("runs/search/*-E*")}
    assert {cell for trial in summary["trials"] for cell in trial["cells"]} == cells
    for trial in summary["trials"]:
        assert [cell.split("-")[-2] for cell in trial["cells"]] == ["s4", "s6", "s11"]


@pytest.mark.slow  # eight trials of up to two rounds
def test_a_trial_that_is_worse_than_the_median_ends_after_fewer_rounds(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    original = site.local_updates

    def counted(group: Any, memories: Any, setup: Any) -> Any:
        trained.extend(broadcast.cell for broadcast in group)
        return original(group, memories, setup)

    monkeypatch.setattr(site, "local_updates", counted)
    settings = ["optimizer.lr=tag(log,interval(1e-7,1e-2))", "rounds=2", "hydra.sweeper.prune_every=1"]
    command(*search_for("train_loss", *settings, trials=8))
    summary = json.loads((tmp_path / "runs" / "search" / "search.json").read_text())
    states = [trial["state"] for trial in summary["trials"]]
    assert set(states[:5]) == {"complete"}
    assert "pruned" in states
    clients, whole = 2, states.count("complete")
    assert len(trained) == clients * (2 * whole + (8 - whole))
    for trial in summary["trials"]:
        assert ("-R1-" in trial["cells"][0]) == (trial["state"] == "pruned")
    first = list(trained)
    assert command(*search_for("train_loss", *settings, trials=8)) == 0
    assert trained == first
    assert json.loads((tmp_path / "runs" / "search" / "search.json").read_text()) == summary


def test_a_search_goes_on_after_cells_that_fail(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*search_for("train_loss", "optimizer.lr=1e30,4e-3", "hydra.sweeper.seed=1")) == 1
    out = capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/search/*/result.json")]
    assert sorted(result["status"] for result in results) == ["completed", "failed"]
    (loss,) = (result["train_loss"] for result in results if result["status"] == "completed")
    assert f"best of 3: train_loss {loss:.4g} with optimizer.lr=0.004" in out
    assert re.search(r"1e\+30 .* failed", out)
    assert "queued" not in out


def test_a_search_goes_on_after_cells_that_cannot_be_run(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = search_for("clients", "clients=200,2", "rounds=0", "hydra.sweeper.seed=1")
    assert command(*settings) == 1
    out, err = capsys.readouterr()
    assert "best of 3: clients 2 with clients=2" in out
    assert err.count("[clients=200] fails, as it cannot be run: clients must be at most 40") == 1
    assert len(list(tmp_path.glob("runs/search/*/result.json"))) == 1


def test_the_loss_of_a_failed_cell_is_no_result(tmp_path: Path) -> None:
    write(tmp_path / "failed", 1, status="failed", train_loss=0.1)
    write(tmp_path / "done", 5, status="completed", train_loss=0.2, fid={"value": 3})
    assert read_numbers(tmp_path / "failed") is None
    assert read_numbers(tmp_path / "absent") is None
    numbers = read_numbers(tmp_path / "done") or {}
    assert (numbers["train_loss"], numbers["fid.value"]) == (0.2, 3.0)
    assert "status" not in numbers


def test_a_search_draws_whole_numbers_for_a_key_that_takes_them(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "epochs=interval(1,3)",
        "model.unet.heads=interval(1,2)",
        "fraction=interval(0.5,1)",
        "rounds=0",
    ]
    settings += ["hydra.sweeper.seed=1"]
    assert command(*search_for("epochs", *settings)) == 0
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/search/*/result.json")]
    assert {result["epochs"] for result in results} <= {1, 2, 3}
    assert any(0.5 < result["fraction"] < 1 for result in results)
    least = min(result["epochs"] for result in results)
    assert f"best of 3: epochs {least} with epochs={least} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (search_for("trainloss", "epochs=1,2"), "metric=trainloss: did you mean train_loss?"),
        (
            search_for("fid.value", "epochs=1,2"),
            "metric=fid.value: evaluation.samples=0 leaves cells",
        ),
        (
            search_for("epochs", "epochs=interval(0.5,2)"),
            "interval(0.5,2): epochs takes whole numbers",
        ),
        (search_for("epochs", "epochs=interval(3,1)"), "the lower one first"),
        (search_for("epochs", "optimizer.lr=tag(log,interval(0,1))"), "with log, above 0"),
        (search_for("epochs", "epochs=1,2", trials=0), "n_trials must be a whole number above 0, got 0"),
        (
            search_for("epochs", "epochs=1,2", "hydra.sweeper.n_jobs=0"),
            "n_jobs must be a whole number",
        ),
        (search_for("epochs", "epochs=1,2", "hydra.sweeper.direction=up"), "must be minimize or maximize"),
        (search_for("epochs", "epochs=1,2", "hydra.sweeper.seeds=[1,1]"), "a list of different seeds, got"),
        (
            search_for("epochs", "epochs=1,2", "hydra.sweeper.prune_every=0"),
            "prune_every must be a whole number",
        ),
        (search_for("epochs", "rounds=1,2", "hydra.sweeper.prune_every=1"), "rounds, which need one value"),
        (
            search_for("epochs", "epochs=1,2", "hydra.sweeper.prune_every=1", "optimizer.decay=cosine"),
            "prune_every needs cells that can go on: optimizer.decay=cosine",
        ),
        (search_for("epochs", "seed=1,2", "hydra.sweeper.seeds=[1,2]"), "so seed cannot be searched"),
        (search_for("", "epochs=1,2"), "metric must be the dotted key of a number in result.json"),
        (
            search_for("epochs", "epochs=1,2", "hydra/launcher=slurm", "hydra.launcher.detach=true"),
            "detach=true: a search waits for its cells",
        ),
        (search_for("epochs", "epochs=1,2", "hydra.sweeper.seeds=3"), "a list of different seeds, got 3"),
        (search_for("epochs", "clients=200,300"), "none of the 3 cells of the search can be run: [clients="),
    ],
)
def test_a_search_that_cannot_be_done_is_refused(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert command(*settings) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_a_second_process_on_a_search_is_refused(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with acquire_lease(tmp_path / "runs" / "search" / ".search"):
        assert command(*search_for("epochs", "epochs=1,2", "rounds=0")) == 1
    assert re.fullmatch(
        r"fedlight: error: search: the search is in use by process \d+ .*\n", capfd.readouterr().err
    )


def test_a_metric_that_no_cell_has_ends_the_search_with_those_there_are(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(*search_for("status", "epochs=1,2", "rounds=0")) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "metric=status: no completed cell has a number of that name; there are " in line
    assert "exchange.params_total" in line
    assert len(list(tmp_path.glob("runs/search/*/result.json"))) == 1


@pytest.mark.slow
def test_smoke_runs_every_method(command: Command, tmp_path: Path) -> None:
    assert command("-m", "sweeps=smoke", "logger=none", "evaluation.grid=0") == 0
    methods = {path.name.split("-")[0] for path in tmp_path.glob("runs/smoke/[A-Z]*")}
    assert methods == {path.stem for path in ROOT.glob("configs/method/*.yaml")}


@pytest.mark.slow
def test_an_agent_of_the_wandb_sweep_runs_a_cell(command: Command, tmp_path: Path) -> None:
    sweep = yaml.safe_load((ROOT / "sweeps" / "wandb.yml").read_text())
    chosen = {
        key: {"value": spec["values"][-1] if "values" in spec else spec["min"]}
        for key, spec in sweep["parameters"].items()
    }
    chosen |= {"rounds": {"value": 0}, "evaluation.grid": {"value": 0}, "logger": {"value": "none"}}
    macros = {**create_sweep_command_args({"args": chosen}), "env": ["/usr/bin/env"]}
    line = [
        word
        for chunk in create_sweep_command(sweep["command"])
        for word in (macros[chunk[2:-1]] if chunk.startswith("${") else [chunk])
    ]
    path = f"{Path(warm_python()).parent}:{os.environ['PATH']}"  # of the program python
    subprocess.run(line, cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    (result,) = tmp_path.glob("runs/wandb/*/result.json")
    assert (json.loads(result.read_text())["method"], result.parent.name[:13]) == ("ULATDEC", "ULATDEC-K10-d")


def test_the_wandb_sweep_is_no_grid(command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("sweeps=wandb") == 2
    assert "sweeps/wandb" in capfd.readouterr().err
