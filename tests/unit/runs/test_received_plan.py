"""`sweeps retry` runs no code of an untrusted plan."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL
from forkserver import warm_python
from sweep_commands import DEAD, call
from trap import Trap

from fedlight.experiment.received_command import check_command
from fedlight.runs.plan import LARGEST, LISTED, Launch, PlannedCell, read_launches
from fedlight.runtime.errors import BadInput

Command = Callable[..., int]
CONFIGS = Path(__file__).parents[3] / "configs"
CELL = "FULL-K2-digits-iid-tiny-R1-E1-s2023-00000000"
GRID = ["-m", "method=FULL,UDEC", "clients=2", "name=grid", *SMALL, "rounds=0"]


def planned(sweep: Path, *command: str, folder: Path | str | None = None) -> Path:
    """A sweep whose only cell is missing; returns the file of its plan."""
    Launch(list(command), str(folder or Path.cwd()), DEAD, {CELL: PlannedCell([], 1)}).write(sweep)
    (path,) = sweep.glob(".plan/*.json")
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "method=FULL,UDEC", "clients=2,5,10", "name=grid", "~trainer.gradient_clip_val"],
        ["sweeps=demo", "--multirun", "experiment=paper", "method=choice(FULL,'UDEC')", "data.limit=null"],
        ["-m", "hydra/launcher=slurm", "hydra.launcher.timeout_min=60", "hydra.launcher.detach=true",
         "hydra.launcher.partition=gpu,long", "hydra.launcher.constraint=a100|h100", "seed=1,2"],
        ["-m", "hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-2))",
         "hydra.sweeper.n_trials=4", "hydra.sweeper.seeds=[1,2]"],
        ["-m", "hydra/launcher=local", "hydra.launcher.n_jobs=4", "+trainer.limit_train_batches=0.25"],
        ["-m", "transform=none,int8", "privacy=null,client", "partition.classes=range(1,4)",
         "method=glob(U*)"],
    ],
)  # fmt: skip
def test_ordinary_commands_need_no_trust(command: list[str]) -> None:
    check_command(command)


@pytest.mark.parametrize(
    "argument",
    [
        "--config-dir=/tmp/x", "--config-path=x", "-cp", "--config-name=x", "--experimental-rerun=x.pickle",
        "--mul", "--", "--hydra-help", "-x", "hydra/launcher=joblib", "hydra/launcher=submitit_local",
        "hydra/job_logging=default", "+hydra/callbacks=x", "hydra.searchpath=[file:///tmp/x]",
        "+hydra.callbacks.x={_target_: os.system}", "hydra.launcher._target_=x.Y", "~hydra.launcher",
        "hydra={launcher: {_target_: x.Y}}", "hydra.launcher={_target_: x.Y}",
        "hydra.launcher.setup=[touch /tmp/x]", "hydra.launcher.srun_args=[x]", "+hydra.launcher.python=x",
        "hydra.launcher.additional_parameters={wrap: x}", "hydra.launcher.submitit_folder=/tmp/x",
        "hydra.launcher.partition='gpu\ntouch /tmp/x'", "hydra.launcher.account=a b",
        "hydra.launcher.partition=[a]", "hydra.launcher.qos={a: b}", "hydra.launcher.mem_gb=range(1,3)",
        "hydra.sweeper.seeds=[x]", "hydra.sweeper.params={x: y}", "hydra.sweeper._target_=x.Y",
        "hydra.job.env_set.PATH=/tmp/x",
        "+hydra.job.env_copy=[x]", "hydra.run.dir=/tmp/x", "hydra.output_subdir=x",
        "method=../../../tmp/x", "method=/tmp/x", "method=nowhere", "method=FULL,../x",
        "+data=[digits,/tmp/x]", "+algorithm={name: x, _target_: os.mkdir}", "logger={_target_: os.mkdir}",
        "method=range(1,3)", "sweeps=/tmp/x", "method@hydra.launcher=FULL", "x/y=z", "x@y=z",
        "name=${oc.env:HOME}", "optimizer.lr=${oc.decode:1}", "x={y: '${oc.env:HOME}'}", "$x=1", "=", "x",
    ],
)  # fmt: skip
def test_overrides_that_can_load_code_need_trust(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput):
        check_command(["-m", argument])
    monkeypatch.chdir(tmp_path)
    planned(tmp_path / "grid", "-m", argument)
    before = sorted(tmp_path.rglob("*"))
    assert call("retry", "grid") == 2
    line, end = capsys.readouterr().err.split(" --trust runs it")
    assert line.startswith("fedlight: error: grid: the command that planned it: ")
    assert end == ", so know where the sweep is from\n"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("group", ["launcher", "sweeper"])
def test_shipped_groups_need_no_trust_unless_they_can_load_code(group: str) -> None:
    code = {"_target_", "params", "setup", "srun_args", "additional_parameters", "submitit_folder"}
    keys: set[str] = set()
    for path in CONFIGS.glob(f"hydra/{group}/*.yaml"):
        check_command(["-m", f"hydra/{group}={path.stem}"])
        keys |= yaml.safe_load(path.read_text()).keys()
    assert len(keys - code) > 5
    for key in keys:
        argument = f"hydra.{group}.{key}=1"
        if key in code:
            with pytest.raises(BadInput, match="sets a key that can run code"):
                check_command(["-m", argument])
        else:
            check_command(["-m", argument])


def test_a_single_cell_is_no_sweep() -> None:
    with pytest.raises(BadInput, match="-m is missing"):
        check_command(["method=FULL"])


def test_a_command_typed_in_another_folder_needs_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    planned(tmp_path / "grid", "-m", "clients=2", folder=foreign)
    assert call("retry", "grid") == 2
    assert f"it was typed in {foreign}: type this there; --trust runs it" in capsys.readouterr().err
    planned(tmp_path / "gone", "-m", "clients=2", folder="/nowhere")
    assert call("retry", "gone", "--trust") == 2
    assert "the folder /nowhere, where its command was typed, is not here" in capsys.readouterr().err


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process that was started by `sweeps retry` without --trust."""
    sweep = tmp_path / "runs" / "grid"
    monkeypatch.setenv(LISTED, str(sweep))
    return sweep


@pytest.mark.parametrize(
    "override",
    [
        "+model.schedule.trained_betas={_target_: torch.load, f: FILE, weights_only: false}",
        "optimizer._target_=torch.optim.Adam,torch.load",
        "+data.source.x={_target_: os.mkdir, path: RAN}",
        "+trainer.callbacks=[{_target_: os.mkdir, path: RAN}]",
        "logger._target_=os.mkdir",
    ],
)
def test_cells_of_a_received_plan_may_call_only_listed_targets(
    command: Command, listed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], override: str
) -> None:
    ran, file = tmp_path / "ran", tmp_path / "payload"
    torch.save(Trap(ran), file)
    grid = [*GRID, override.replace("FILE", str(file)).replace("RAN", str(ran))]
    check_command(grid)  # one key among others, as far as its text goes
    assert command(*grid) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fedlight: error: ")
    assert "--trust runs it, so know where the sweep is from" in line
    assert not ran.exists()
    assert not listed.exists()


def test_a_rejected_plan_is_not_removed(command: Command, listed: Path) -> None:
    plan = planned(listed, "-m")
    before = plan.read_text()
    assert command(*GRID, "optimizer._target_=torch.load") == 2
    assert plan.read_text() == before


def test_cells_of_a_received_plan_must_lie_in_the_folder_of_the_sweep(
    command: Command, listed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(*GRID, "name=other") == 2
    assert f"output=runs name=other is not the folder {listed}" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert command(*GRID, "method=FULL") == 0
    assert len(list(listed.glob("*/result.json"))) == 1


@pytest.mark.slow
def test_retry_runs_a_sweep_and_no_code_injected_into_its_plan(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", warm_python())
    assert command(*GRID) == 0
    for path in tmp_path.glob("runs/grid/FULL*/result.json"):
        path.unlink()
    (path,) = tmp_path.glob("runs/grid/.plan/*.json")
    plan = json.loads(path.read_text()) | {"process": asdict(DEAD)}
    ran, file = tmp_path / "ran", tmp_path / "payload"
    torch.save(Trap(ran), file)
    payload = f"+model.schedule.trained_betas={{_target_: torch.load, f: {file}, weights_only: false}}"
    path.write_text(json.dumps(plan | {"command": [*plan["command"], payload]}))
    assert call("retry", "runs/grid") == 2
    assert "model.schedule.trained_betas._target_ would run torch.load" in capfd.readouterr().err
    assert not ran.exists()
    call("retry", "runs/grid", "--trust")
    assert ran.exists()  # the payload is a real one
    for other in tmp_path.glob("runs/grid/.plan/*.json"):
        other.unlink()
    path.write_text(json.dumps(plan))
    assert call("retry", "runs/grid") == 0
    assert len(list(tmp_path.glob("runs/grid/*/result.json"))) == 2


# ---- the file of a plan


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = {"a.b": [1, {"c": None}], "privacy.clip": float("inf"), "x": "é"}
    cells = {CELL: PlannedCell(["clients=2"], 4, "12_3", config), "b": PlannedCell([], 0, None, {"x": 1})}
    launch = Launch(["-m", "clients=2"], "/somewhere", DEAD, cells)
    launch.write(tmp_path)
    assert read_launches(tmp_path) == [launch]


def without(plan: Any, key: str) -> Any:
    return {name: value for name, value in plan.items() if name != key}


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan | {"run": "x"},
        lambda plan: without(plan, "command"),
        lambda plan: plan | {"command": "-m clients=2"},
        lambda plan: plan | {"command": [["-m"]]},
        lambda plan: plan | {"command": ["x" * 20_000]},
        lambda plan: plan | {"folder": None},
        lambda plan: plan | {"process": plan["process"] | {"since": "yesterday"}},
        lambda plan: plan | {"process": plan["process"] | {"pid": "../../1"}},
        lambda plan: plan | {"process": plan["process"] | {"pid": -1}},
        lambda plan: plan | {"process": plan["process"] | {"job": "1 --user=me"}},
        lambda plan: plan | {"cells": {"../../x": plan["cells"][CELL]}},
        lambda plan: plan | {"cells": {".hidden": plan["cells"][CELL]}},
        lambda plan: plan | {"cells": {CELL: plan["cells"][CELL] | {"job": "--user=me"}}},
        lambda plan: plan | {"cells": {CELL: plan["cells"][CELL] | {"job": "12\n13"}}},
        lambda plan: plan | {"cells": {CELL: plan["cells"][CELL] | {"rounds": 10**30}}},
        lambda plan: plan | {"cells": {CELL: plan["cells"][CELL] | {"rounds": "1"}}},
        lambda plan: plan | {"cells": {CELL: plan["cells"][CELL] | {"config": [1]}}},
        lambda plan: [plan],
        lambda plan: None,
    ],
)
def test_a_file_that_is_no_plan_counts_as_none(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    path = planned(tmp_path, "-m", "clients=2")
    plan = json.loads(path.read_text())
    assert len(read_launches(tmp_path)) == 1
    path.write_text(json.dumps(change(plan)))
    assert read_launches(tmp_path) == []


@pytest.mark.parametrize("content", [b'{"cells": ' + b"[" * 200_000, b"\xff\xfe", b"", b'{"a": 1e999'])
def test_a_broken_plan_counts_as_none(tmp_path: Path, content: bytes) -> None:
    planned(tmp_path, "-m").write_bytes(content)
    assert read_launches(tmp_path) == []


def test_a_plan_is_read_only_up_to_the_maximum_size(tmp_path: Path) -> None:
    path = planned(tmp_path, "-m")
    os.truncate(path, LARGEST + 10)
    assert read_launches(tmp_path) == []
