"""What a cell logs, read back by each logger's own reader; several loggers at once; restarts."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlight.compose import compose_config
from fedlight.experiment.received_command import check_command
from fedlight.experiment.targets import check_targets, check_tracking
from fedlight.loggers.metrics import CellLog
from fedlight.loggers.tensorboard_runs import CellTensorBoard
from fedlight.overrides import keep_text
from fedlight.runtime.errors import BadInput

TENSORBOARD = {"_target_": "fedlight.loggers.tensorboard_runs.tensorboard_logger"}
MLFLOW = {"_target_": "fedlight.loggers.mlflow_runs.mlflow_logger", "tracking_uri": None}
CSV = {"_target_": "fedlight.loggers.metrics.csv_logger"}
PARAMETERS = {"method": {"name": "UDEC"}, "optimizer": {"lr": 0.1}, "seed": 3, "logger": {"api_key": "***"}}
RESULT: dict[str, Any] = {
    "status": "completed",
    "rounds": 3,
    "cell": "cell",
    "data": "digits",
    "partition": "iid",
    "clients": 2,
    "method": "UDEC",
    "seed": 3,
    "train_loss": 0.5,
    "fid": None,
    "exchange": {"params_total": 1, "bytes_total": 4, "reduction": 0.5},
    "seconds": {"total": 1.0},
}


def log_rounds(node: dict[str, Any], sweep: Path, rounds: range, finish: bool) -> None:
    """What a process of the cell `cell` logs that begins after its first rounds, as a restarted one does."""
    folder = sweep / "cell"
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    picture = folder / "samples" / "round.png"
    Image.new("L", (4, 2), 200).save(picture)
    log = CellLog(node, folder, "sweep", "cell", PARAMETERS)
    for number in rounds:
        row = {"round": number, "train_loss": 1 / number, "fid": None, "seconds": 2.0}
        log.round(row, {"0": 0.25, "1": 0.75}, {"kid": 0.125, "extractor": "classifier"})
        log.pictures(number, samples=picture, missing=folder / "missing.png")
    if finish:
        log.finish(RESULT)
    else:
        _flush(log)


def _flush(log: CellLog) -> None:
    """Writes now what this process would write after the end of the one that it stands for."""
    for logger in log._loggers:
        if isinstance(logger, CellTensorBoard):
            logger.experiment.close()


def test_tensorboard_s_own_reader_finds_each_round_once(tmp_path: Path) -> None:
    log_rounds(TENSORBOARD, tmp_path, range(1, 3), finish=False)
    log_rounds(TENSORBOARD, tmp_path, range(1, 4), finish=True)
    events = EventAccumulator(str(tmp_path / "cell" / "tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    losses = events.Scalars("train_loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert [event.value for event in losses] == pytest.approx([1, 1 / 2, 1 / 3])
    assert {"scores/kid", "client_loss/1", "round_seconds"} <= set(events.Tags()["scalars"])
    pictures = events.Images("samples")
    assert [(picture.step, picture.width, picture.height) for picture in pictures] == [
        (number, 4, 2) for number in (1, 2, 3)
    ]
    assert "result/text_summary" in events.Tags()["tensors"]
    assert "UDEC" in (tmp_path / "cell" / "tensorboard" / "hparams.yaml").read_text()


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path) -> None:
    log_rounds(MLFLOW, tmp_path, range(1, 3), finish=False)
    log_rounds(MLFLOW, tmp_path, range(1, 4), finish=True)
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("sweep")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("cell", "FINISHED")
    for metric in ("train_loss", "round", "scores/kid", "client_loss/1"):
        assert [entry.step for entry in client.get_metric_history(run.info.run_id, metric)] == [1, 2, 3]
    assert run.data.params["optimizer/lr"] == "0.1"
    assert run.data.params["setting/method"] == "UDEC"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"samples", "result.json"}


def test_several_loggers_at_once_and_one_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlight.loggers.tensorboard_runs.CellTensorBoard.log_image", fail)
    node = {"_target_": None, "csv": CSV, "tensorboard": TENSORBOARD}
    log_rounds(node, tmp_path, range(1, 3), finish=True)
    with (tmp_path / "cell" / "metrics" / "metrics.csv").open() as file:
        assert [row["round"] for row in csv.DictReader(file)] == ["1", "2"]
    assert list((tmp_path / "cell" / "tensorboard").glob("events.*"))
    assert capsys.readouterr().err.count("the logger failed (no disk); the cell goes on without it") == 1


def fail(*_: Any, **__: Any) -> None:
    raise OSError("no disk")


def test_a_logger_of_lightning_by_its_target(tmp_path: Path) -> None:
    node = {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "mine"}
    log_rounds(node, tmp_path, range(1, 3), finish=True)
    (hparams,) = (tmp_path / "cell" / "mine").glob("*/hparams.yaml")
    assert "UDEC" in hparams.read_text()
    with pytest.raises(BadInput, match=r"logger\._target_ would run lightning"):
        check_targets({"logger": node})


def test_a_list_of_loggers_is_composed_by_hydra() -> None:
    logger = compose_config(["logger=[csv, mlflow]", "logger.mlflow.tracking_uri=file:x"]).logger
    assert set(logger) == {"_target_", "csv", "mlflow"}
    assert logger.mlflow.tracking_uri == "file:x"
    assert logger.csv._target_ == CSV["_target_"]
    command = keep_text(["logger=[csv,mlflow]"])
    check_command(["-m", *command])
    with pytest.raises(BadInput, match="moves a configuration"):
        check_command(["-m", "+data@logger.csv=digits"])


def test_a_received_configuration_logs_to_no_server_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"_target_": None, "mlflow": {**MLFLOW, "tracking_uri": "http://elsewhere"}}
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check_targets({"logger": node})
    with pytest.raises(BadInput, match=r"logger\.mlflow\.tracking_uri=http://elsewhere would send"):
        check_tracking({"logger": node})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    check_tracking({"logger": node})


@pytest.mark.parametrize(("library", "node"), [("tensorboard", TENSORBOARD), ("mlflow", MLFLOW)])
def test_a_library_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, node: dict[str, Any]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BadInput, match=rf"logger: pip install 'fedlight\[{library}\]'; logger=none"):
        CellLog(node, tmp_path, "sweep", "cell", PARAMETERS)
