"""A cell's files and its ways to end."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from composed import config
from conftest import SMALL, Cell
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from wandb_file import history_of, read_wandb

from fedlight.experiment.finished import open_cell
from fedlight.experiment.trial import check
from fedlight.federation.server import Server
from fedlight.loggers.metrics import CellLog
from fedlight.runtime.secret import masked

MakeCell = Callable[..., Cell]

FILES = {
    *("result.json", "rounds.csv", "ledger.csv", "partition.csv", "partition.png", "config.yaml"),
    "files.sha256",
    *("samples", "model", "checkpoint"),
}


def test_a_cell_leaves_its_files(cell: MakeCell) -> None:
    made = cell("method=UDEC", "clients=3")
    assert {path.name for path in made.folder.iterdir()} == FILES - {"model"}  # the clients' own were trained
    result = made.result
    assert (result["schema"], result["status"], result["error"]) == (1, "completed", None)
    assert (result["method"], result["clients"], result["rounds"], result["epochs"]) == ("UDEC", 3, 2, 1)
    assert (result["data"], result["partition"], result["model"]) == ("digits", "iid", "tiny")
    assert result["cell"] == made.folder.name
    assert len(set(result["client_sha256"])) == 3
    assert result["train_loss"] == float(made.rows("rounds.csv")[-1]["train_loss"])
    assert result["seconds"]["total"] > result["seconds"]["training"] > 0
    assert result["seconds"]["startup"] > 0
    assert result["seconds"]["sampling"] == 0  # nothing is drawn
    assert result["memory"]["peak_mb"] > 100
    assert (result["memory"]["gpu_peak_mb"], result["memory"]["processes"]) == (None, 1)
    updates = result["rounds"] * result["epochs"] * sum(made.sizes)  # images
    parts = check(config(), elsewhere=False)
    assert parts
    assert result["flops"]["training"] == round(updates * parts.image_flops.training)
    assert result["flops"]["total"] == result["flops"]["training"] > 0
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert yaml.safe_load((made.folder / "config.yaml").read_text())["method"]["downlink"] == ["decoder"]


def test_the_state_s_hash_is_over_sorted_names_and_raw_bytes(finished: MakeCell) -> None:
    made = finished("clients=2")
    state = made.model
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"unet.{name}".encode() + state[name].numpy().tobytes())
    assert made.result["state_sha256"] == digest.hexdigest()


def test_the_model_generates_by_itself(finished: MakeCell) -> None:
    pipeline = DDPMPipeline.from_pretrained(finished("clients=2").folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    assert torch.equal(pipeline.scheduler.alphas_cumprod, schedule.alphas_cumprod)
    drawn = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=2).images
    assert [image.size for image in drawn] == [(8, 8)] * 2
    assert all(len(set(image.tobytes())) > 20 for image in drawn)
    assert drawn[0].tobytes() != drawn[1].tobytes()


@pytest.mark.slow
def test_client_level_methods_draw_a_row_for_each_client(cell: MakeCell) -> None:
    drawn = [
        cell(f"method={method}", f"clients={clients}", "evaluation.grid=4")
        for method, clients in (("FULL", 2), ("UDEC", 2), ("UDEC", 4))
    ]
    one, two, four = (Image.open(made.folder / "samples" / "round_002.png").height for made in drawn)
    assert two - one > 50
    assert four - one == pytest.approx(3 * (two - one), abs=3)


def test_a_finished_cell_is_skipped(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*SMALL) == 0
    (result,) = tmp_path.glob("runs/default/*/result.json")
    written = result.stat().st_mtime_ns
    assert command(*SMALL) == 0
    assert "done already" in capsys.readouterr().out
    assert result.stat().st_mtime_ns == written


def test_a_loss_that_leaves_the_numbers_stops_the_cell_and_names_round_and_client(
    command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(*SMALL, "optimizer.lr=1e25") == 1
    (path,) = tmp_path.glob("runs/default/*/result.json")
    result = json.loads(path.read_text())
    assert result["status"] == "failed"
    assert "loss of client 0 became" in result["error"]
    assert "in round 1" in result["error"]
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert result["error"] in line


def test_weights_that_leave_the_numbers_in_the_last_step_stop_the_cell_too(
    command: Callable[..., int], tmp_path: Path
) -> None:
    assert command(*SMALL, "optimizer.lr=1e38", "clients=2", "rounds=1", "data.batch_size=128") == 1
    (path,) = tmp_path.glob("runs/default/*/result.json")
    assert (
        json.loads(path.read_text())["error"] == "the weights of client 0 left the finite numbers in round 1"
    )


def test_an_error_of_our_own_code_is_raised_and_the_cell_has_failed(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("of our own")

    monkeypatch.setattr(Server, "start_round", fail)
    with pytest.raises(RuntimeError, match="of our own"):
        command(*SMALL)
    (path,) = tmp_path.glob("runs/default/*/result.json")
    result = json.loads(path.read_text())
    assert (result["status"], result["error"], result["state_sha256"]) == ("failed", "of our own", None)
    assert not (path.parent / "model").exists()


def test_a_failed_cell_is_tried_again(command: Callable[..., int], tmp_path: Path) -> None:
    assert command(*SMALL) == 0
    (path,) = tmp_path.glob("runs/default/*/result.json")
    quiet = json.loads(path.read_text())
    path.write_text(json.dumps({**quiet, "status": "failed"}))
    assert command(*SMALL) == 0
    again = json.loads(path.read_text())
    assert (again["status"], again["state_sha256"]) == ("completed", quiet["state_sha256"])


def test_a_client_smaller_than_a_batch_trains(cell: MakeCell) -> None:
    made = cell("data.batch_size=32", "clients=4", "partition=quantity_skew")
    assert min(made.sizes) < 32 < max(made.sizes)
    assert {int(row["client"]) for row in made.rows("ledger.csv") if row["direction"] == "up"} == set(
        range(4)
    )


def test_secrets_are_masked_in_the_configuration() -> None:
    config = {
        "logger": {"api_key": "hunter2", "num_tokens": 7},
        "hosts": [{"token": "hunter2"}],
        "password": None,
    }
    assert masked(config) == {
        "logger": {"api_key": "***", "num_tokens": 7},
        "hosts": [{"token": "***"}],
        "password": None,
    }


@pytest.mark.slow
def test_a_cell_inside_a_slurm_job_joins_no_world(cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = cell()
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    for name, value in (job | {"SLURM_NODEID": "0", "SLURM_JOB_NAME": "sweep"}).items():
        monkeypatch.setenv(name, value)
    assert cell().result["state_sha256"] == quiet.result["state_sha256"]


def test_csv_logs_every_round_and_client(cell: MakeCell) -> None:
    made = cell("logger=csv", "clients=2", "partition=quantity_skew")
    rows = made.rows("metrics/metrics.csv")
    assert [int(float(row["round"])) for row in rows] == [1, 2]
    for row, plain in zip(rows, made.rows("rounds.csv"), strict=True):
        losses = [float(row[f"client_loss/{client}"]) for client in range(2)]
        assert losses[0] != losses[1]
        mean = sum(n * loss for n, loss in zip(made.sizes, losses, strict=True)) / sum(made.sizes)
        assert float(row["train_loss"]) == float(plain["train_loss"]) == pytest.approx(mean)


def test_several_loggers_log_every_round_of_a_grid(command: Callable[..., int], tmp_path: Path) -> None:
    settings = ["clients=2", "rounds=1", "logger=[csv,tensorboard]", "seed=1,2"]
    assert command("-m", *(argument for argument in SMALL if argument != "logger=none"), *settings) == 0
    cells = [path.parent for path in tmp_path.glob("runs/default/*/result.json")]
    assert len(cells) == 2
    for folder in cells:
        assert [row["round"] for row in Cell(folder).rows("metrics/metrics.csv")] == ["1"]
        assert len(list(folder.glob("tensorboard/events.out.tfevents.*"))) == 1


def test_wandb_runs_offline_with_rounds_config_pictures_summary_and_a_row_of_the_table_of_cells(
    cell: MakeCell,
) -> None:
    made = cell("logger=wandb", "clients=2", "evaluation.grid=4")
    (run,) = made.folder.glob("wandb/offline-run-*/run-*.wandb")
    records = list(read_wandb(run))
    history = history_of(run)
    rounds = [row for row in history if "train_loss" in row]
    assert [row["round"] for row in rounds] == [1, 2]
    assert all(row["round"] in (1, 2) for row in history)
    axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in records if r.metric.ByteSize()}
    assert axes["*"] == "round"
    (start,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert start.run_group == made.folder.parent.name
    assert start.display_name == made.folder.name
    assert sorted(start.tags) == ["FULL", "digits", "iid"]
    (setting,) = (json.loads(item.value_json) for item in start.config.update if item.key == "setting")
    assert setting["algorithm"] == "none"
    assert setting["method"] == "FULL"
    assert all("seconds" not in row and row["round_seconds"] > 0 for row in rounds)
    assert "clients" in {item.key for item in start.config.update} | {
        item.key for r in records for item in r.config.update
    }
    media = {path.name.split("_")[0] for path in run.parent.glob("files/media/images/*.png")}
    assert media == {"partition", "samples"}

    summary = {
        item.key: json.loads(item.value_json) for r in records for item in r.summary.update if item.key
    }
    result = made.result
    assert (summary["status"], summary["cell"]) == ("completed", made.folder.name)
    assert summary["exchange"] == result["exchange"]
    assert summary["seconds"].keys() == result["seconds"].keys()
    (path,) = run.parent.glob("files/media/table/cells_*.table.json")
    table = json.loads(path.read_text())
    (row,) = (dict(zip(table["columns"], line, strict=True)) for line in table["data"])
    assert (row["cell"], row["method"], row["clients"]) == (made.folder.name, "FULL", 2)
    assert row["bytes_total"] == result["exchange"]["bytes_total"]
    assert row["train_loss"] == result["train_loss"]


def test_help_names_the_choices_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['run', '--help']; from fedlight.run import main\ntry: main()\nfinally: "
        "print([m for m in ('torch', 'lightning', 'diffusers', 'wandb', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "method=... (default: FULL)" in done.stdout
    for method in ("CENTRAL", "FULL", "LOCAL", "UDEC", "ULATDEC", "USPLIT"):
        assert re.search(rf"^    {method} ", done.stdout, re.MULTILINE)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.slow
def test_an_installed_wheel_finds_its_configs(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, site], check=True)
    elsewhere.mkdir()
    typed = [sys.executable, "-m", "fedlight.run", "-m", "sweeps=demo", "method=UDEC", "clients=2,3"]
    small = ["rounds=0", "evaluation.grid=0", "evaluation.samples=0", "logger=none"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(typed + small, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runs/demo: 2 cells" in done.stdout
    assert len(list(elsewhere.glob("runs/demo/UDEC-*/result.json"))) == 2


def test_a_client_that_was_never_drawn_has_the_model_of_the_start(cell: MakeCell) -> None:
    made = cell("method=UDEC", "clients=3", "rounds=1", "fraction=0.34", "evaluation.grid=0")
    finished = open_cell(made.folder)
    (drawn,) = {int(row["client"]) for row in made.rows("ledger.csv")}
    first = finished.server.global_state()
    changed = [
        {name for name, tensor in finished.state(client).items() if not tensor.equal(first[name])}
        for client in range(3)
    ]
    assert [bool(names) for names in changed] == [client == drawn for client in range(3)]
    assert not any(".ups." in name or ".head." in name for name in changed[drawn])
    assert len(set(made.result["client_sha256"])) == 2


def test_a_private_cell_without_rounds_has_spent_nothing(cell: MakeCell) -> None:
    entry = cell("privacy=client", "rounds=0").result["privacy"]
    assert (entry["kind"], entry["epsilon"]) == ("client", 0.0)


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_images_of_each_round_reach_the_log(
    rounds: int, cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, Path]]] = []
    monkeypatch.setattr(CellLog, "pictures", lambda log, round_, **paths: logged.append((round_, paths)))
    made = cell(f"rounds={rounds}", "evaluation.grid=2", "evaluation.every=1")
    folder = made.folder.relative_to(Path.cwd())
    samples = [
        (r, {"samples": folder / "samples" / f"round_{r:03d}.png"}) for r in range(rounds and 1, rounds + 1)
    ]
    assert logged == [*samples, (rounds, {"partition": folder / "partition.png"})]
    assert all(path.is_file() for _, paths in logged for path in paths.values())
