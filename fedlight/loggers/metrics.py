"""The loggers of a cell: Lightning's loggers, of which W&B and CSV are made here."""

import hashlib
import inspect
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from fedlight.loggers.run_setting import with_setting
from fedlight.loggers.several import split_loggers
from fedlight.loggers.wandb_mode import GROUP, RUN, SWEEP, wandb_mode
from fedlight.runtime.errors import BadInput
from fedlight.runtime.secret import redacted

GROUPS = ("coverage", "label_accuracy", "downstream_accuracy")  # entries of `fid` that hold several numbers
LONGEST_TAG = 64  # maximum number of characters of a tag of W&B
EXTRAS = {
    "fedlight.loggers.tensorboard_runs.tensorboard_logger": "tensorboard",
    "fedlight.loggers.mlflow_runs.mlflow_logger": "mlflow",
}
"""Shipped loggers and the extras of fedlight with their libraries."""
PATIENCE = {"init_timeout": 30.0, "finish_timeout": 60.0}  # seconds for W&B to start and to end a run


class CellLog:
    """Passes the metrics of a cell to its loggers.

    If a logger fails, a message is printed once, and the cell continues without it.

    Args:
        node: section `logger` of the configuration, a logger where it has a `_target_`; each mapping in it
            that has one is a further logger.
        folder: of the cell.
        sweep: name of the cell's sweep.
        cell: id of the cell.
        parameters: configuration of the cell with masked secrets.

    Raises:
        BadInput: the logger cannot be made.
    """

    def __init__(
        self, node: dict[str, Any], folder: Path, sweep: str, cell: str, parameters: dict[str, Any]
    ) -> None:
        self._loggers: list[Logger] = []
        for key, single in split_loggers(node).items():
            try:
                self._loggers.append(_make_logger(single, folder, sweep, cell, parameters))
            except Exception as error:  # each logger has its own types of errors
                target = str(single["_target_"])
                reason = explain_missing(error, target) or error
                raise BadInput(f"{key}: {reason}; logger=none needs nothing") from error

    def round(self, row: dict[str, Any], client_losses: dict[str, float], fid: dict[str, Any]) -> None:
        """Logs a row of `rounds.csv`, the given clients' losses and the metrics of a `fid` entry."""
        metrics = {key: value for key, value in row.items() if value is not None}
        metrics["round_seconds"] = metrics.pop("seconds")  # `seconds` are those of the result, by kind
        metrics |= _score_metrics(fid)
        metrics |= {f"client_loss/{client}": loss for client, loss in client_losses.items()}
        self._try(lambda logger: logger.log_metrics(metrics, step=row["round"]))

    def scores(self, round_: int, columns: dict[str, float | None], fid: dict[str, Any]) -> None:
        """Logs the scores of the last round, which came after its other numbers.

        Args:
            round_: its number.
            columns: of the round's row of `rounds.csv`.
            fid: the `fid` entry of `result.json`.
        """
        metrics: dict[str, Any] = {key: value for key, value in columns.items() if value is not None}
        metrics |= {"round": round_, **_score_metrics(fid)}
        self._try(lambda logger: logger.log_metrics(metrics, step=round_))

    def pictures(self, round_: int, **pictures: Path) -> None:
        """Logs existing PNG files under their names, by loggers that show images."""

        def log(logger: Any, key: str, path: Path) -> None:
            if hasattr(logger, "log_image"):
                logger.log_image(key=key, images=[str(path)], step=round_)

        for key, path in pictures.items():
            if path.is_file():
                self._try(partial(log, key=key, path=path))

    def finish(self, result: dict[str, Any]) -> None:
        """Logs the result, on W&B as the run's summary and a row of the table `cells`; closes the loggers."""
        completed = result["status"] == "completed"

        def close(logger: Any) -> None:
            if hasattr(logger, "log_result"):
                logger.log_result(result)
            if isinstance(logger, WandbLogger):
                row = cell_row(result)
                logger.log_table("cells", columns=list(row), data=[list(row.values())], step=result["rounds"])
                logger.experiment.summary.update(result)
                logger.experiment.finish(exit_code=0 if completed else 1)
            logger.finalize("success" if completed else "failed")

        self._try(close)

    def _try(self, action: Callable[[Any], object]) -> None:
        """Calls `action` with each logger; one that fails is dropped."""
        for logger in list(self._loggers):
            try:
                action(logger)
            except Exception as error:  # each logger has its own types of errors
                self._loggers.remove(logger)
                if isinstance(logger, WandbLogger):
                    _reset()
                _mention(f"the logger failed ({error}); the cell goes on without it")


def _make_logger(
    node: dict[str, Any], folder: Path, sweep: str, cell: str, parameters: dict[str, Any]
) -> Logger:
    """The logger of a section.

    A function is called with folder, sweep, cell and parameters; a class of Lightning with the keys of the
    section alone, and with the cell's folder as `save_dir` where it takes that and the section has none.
    """
    target = get_object(node["_target_"])
    if not (isinstance(target, type) and issubclass(target, Logger)):
        made: Logger = instantiate(node, _partial_=True)(folder, sweep, cell, parameters)
        return made
    here = {"save_dir": str(folder)} if "save_dir" in inspect.signature(target).parameters else {}
    logger: Logger = instantiate({**here, **node})
    logger.log_hyperparams(with_setting(parameters))
    return logger


def explain_missing(error: Exception, target: str) -> str | None:
    """What to install where a shipped logger lacks its library; None for another error."""
    extra = EXTRAS.get(target)
    if extra is None or not isinstance(error.__cause__ or error, ImportError):
        return None
    return f"pip install 'fedlight[{extra}]'"


def _score_metrics(fid: dict[str, Any]) -> dict[str, float]:
    """The metrics of a `fid` entry, those of groups such as `downstream_accuracy` included."""
    metrics = {f"scores/{name}": value for name, value in fid.items() if isinstance(value, float)}
    for group in GROUPS:
        metrics |= {
            f"scores/{group}.{name}": value
            for name, value in (fid.get(group) or {}).items()
            if isinstance(value, float)
        }
    return metrics | {
        f"client_fid/{client}": value
        for client, value in zip(fid.get("clients") or (), fid.get("per_client") or (), strict=True)
    }


def cell_row(result: dict[str, Any]) -> dict[str, Any]:
    """A cell in one row: its configuration, traffic and image quality."""
    keys = ("cell", "status", "data", "partition", "clients", "method", "seed", "train_loss")
    fid, exchange = result["fid"] or {}, result["exchange"]
    downstream, memory, flops = fid.get("downstream_accuracy"), result["memory"], result["flops"]
    return {
        **{key: result[key] for key in keys},
        "extractor": fid.get("extractor"),
        "fid": fid.get("value"),
        "fid_std": fid.get("std"),
        **{key: exchange[key] for key in ("params_total", "bytes_total", "reduction")},
        **{key: fid.get(key) for key in ("density", "coverage_knn")},
        "downstream_accuracy": downstream and downstream["generated"],
        "seconds": result["seconds"]["total"],
        "peak_mb": memory and memory["peak_mb"],
        "flops": flops and flops["total"],
    }


def csv_logger(folder: Path, sweep: str, cell: str, parameters: dict[str, Any]) -> CSVLogger:
    """Writes every metric to `metrics/metrics.csv` in the cell's folder."""
    return CSVLogger(folder, name="", version="metrics", flush_logs_every_n_steps=1)


def wandb_logger(
    folder: Path, sweep: str, cell: str, parameters: dict[str, Any], project: str, entity: str | None
) -> WandbLogger:
    """A W&B run of the cell, in the group of its sweep; sweep and cell determine its id.

    Under a W&B agent a single cell is the agent's run; the cells of a grid are grouped by the agent's sweep.
    `config.setting` has the names that runs are grouped by, `none` if a group is not chosen. The run is
    online if a key is known or WANDB_MODE says so, else offline in the cell's folder.
    """
    config = with_setting(parameters)
    default_id = hashlib.blake2b(f"{sweep}/{cell}".encode(), digest_size=8).hexdigest()
    arguments = {
        "project": project,
        "entity": entity,
        "name": cell,
        "group": os.environ.get(GROUP) or sweep,
        "job_type": "cell",
        "id": os.environ.get(RUN, default_id) if SWEEP in os.environ else default_id,
        "save_dir": folder.absolute(),  # W&B's service has a working folder of its own
        "config": config,
        "tags": [config["setting"][key][:LONGEST_TAG] for key in ("method", "data", "partition")],
    }
    if wandb_mode() == "online":
        try:
            return _start(mode="online", resume="allow", **arguments)
        except Exception as error:  # W&B has its own types of errors
            _mention(f"W&B: {error}; offline instead, from here on")
            os.environ["WANDB_MODE"] = "offline"
            _reset()
    if wandb_mode() == "offline":
        _mention_offline(folder.parent)
        for piece in (folder / "wandb").glob(f"offline-run-*-{arguments['id']}"):
            shutil.rmtree(piece)  # of a stopped process: its metrics are logged again
    return _start(mode=wandb_mode(), **arguments)


def _start(**arguments: Any) -> WandbLogger:
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    patience: dict[str, Any] = {
        name: seconds for name, seconds in PATIENCE.items() if f"WANDB_{name.upper()}" not in os.environ
    }
    logger = WandbLogger(settings=wandb.Settings(console="off", **patience), **arguments)
    logger.experiment.define_metric("round")
    logger.experiment.define_metric("*", step_metric="round")
    return logger


def _reset() -> None:
    """Ends W&B's service, which may have died or still hold the run's id; the next run starts another one."""
    import wandb

    with suppress(Exception):  # it may be the service itself that failed
        wandb.teardown()
    wandb.run = None  # Lightning would log to it
    os.environ.pop("WANDB_SERVICE", None)  # the address of the ended service


def _mention(message: str) -> None:
    print(f"fedlight: {redacted(' '.join(message.split()))}", file=sys.stderr)


@cache
def _mention_offline(sweep_folder: Path) -> None:
    """Prints once for each sweep where its offline runs are."""
    runs = sweep_folder / "*" / "wandb" / "offline-run-*"
    _mention(f"W&B: offline (no key, or WANDB_MODE says so); to send the runs later: wandb sync {runs}")
