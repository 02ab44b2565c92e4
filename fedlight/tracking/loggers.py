"""The loggers of a cell, Lightning's own: Weights & Biases and CSV."""

import hashlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig

from fedlight.runtime.errors import BadInput
from fedlight.tracking.service import wandb_mode


def make_logger(
    node: DictConfig, folder: Path, sweep: str, cell: str, parameters: dict[str, Any]
) -> Logger | None:
    """The logger that the configuration names, or None."""
    if node.get("_target_") is None:
        return None
    try:
        logger: Logger = instantiate(node, _partial_=True)(folder, sweep, cell, parameters)
    except Exception as error:  # W&B has errors of its own
        raise BadInput(f"logger: {error}; logger=none or WANDB_MODE=offline needs no service") from error
    return logger


def log_round(
    logger: Logger | None, row: dict[str, Any], client_losses: dict[str, float], fid: dict[str, Any]
) -> None:
    """Logs a row of `rounds.csv`, the given clients' losses and the metrics of a `fid` entry."""
    if logger is None:
        return
    metrics = {key: value for key, value in row.items() if value is not None}
    metrics |= {f"scores/{name}": value for name, value in fid.items() if isinstance(value, float)}
    metrics |= {
        f"client_fid/{client}": value
        for client, value in zip(fid.get("clients") or (), fid.get("per_client") or (), strict=True)
    }
    metrics |= {f"client_loss/{client}": loss for client, loss in client_losses.items()}
    logger.log_metrics(metrics, step=row["round"])


def log_pictures(logger: Logger | None, round_: int, **pictures: Path | None) -> None:
    """Logs PNG files under their names, where the logger shows images."""
    if isinstance(logger, WandbLogger):
        for key, path in pictures.items():
            if path is not None:
                logger.log_image(key, [str(path)], step=round_)


def finish(logger: Logger | None, result: dict[str, Any]) -> None:
    """Leaves the result as the run's summary and as a row of the table `cells`, and closes the logger."""
    if logger is None:
        return
    if isinstance(logger, WandbLogger):
        row = cell_row(result)
        logger.log_table("cells", columns=list(row), data=[list(row.values())], step=result["rounds"])
        logger.experiment.summary.update(result)
        logger.experiment.finish(exit_code=0 if result["status"] == "completed" else 1)
    logger.finalize("success" if result["status"] == "completed" else "failed")


def cell_row(result: dict[str, Any]) -> dict[str, Any]:
    """A cell in one row: what it was, what it exchanged, how good its images are."""
    keys = ("cell", "status", "data", "partition", "clients", "method", "seed", "train_loss")
    fid, exchange = result["fid"] or {}, result["exchange"]
    return {
        **{key: result[key] for key in keys},
        "extractor": fid.get("extractor"),
        "fid": fid.get("value"),
        "fid_std": fid.get("std"),
        **{key: exchange[key] for key in ("params_total", "bytes_total", "reduction")},
        "seconds": result["seconds"]["total"],
    }


def csv_logger(folder: Path, sweep: str, cell: str, parameters: dict[str, Any]) -> CSVLogger:
    """Writes every metric to `metrics/metrics.csv` in the cell's folder."""
    return CSVLogger(folder, name="", version="metrics", flush_logs_every_n_steps=1)


def wandb_logger(
    folder: Path, sweep: str, cell: str, parameters: dict[str, Any], project: str, entity: str | None
) -> WandbLogger:
    """A W&B run of the cell, in the group of its sweep; its id follows from both.

    Online where a key is known or WANDB_MODE asks for it, else offline in the cell's folder.
    """
    import wandb

    mode = wandb_mode()
    if mode == "offline":
        _tell_offline(folder.parent)
    wandb.setup(wandb.Settings(silent=True))
    logger = WandbLogger(
        project=project,
        entity=entity,
        name=cell,
        group=sweep,
        job_type="cell",
        id=hashlib.blake2b(f"{sweep}/{cell}".encode(), digest_size=8).hexdigest(),
        save_dir=folder,
        mode=mode,
        resume="allow" if mode == "online" else None,
        config=parameters,
        settings=wandb.Settings(console="off"),
    )
    logger.experiment.define_metric("round")
    logger.experiment.define_metric("*", step_metric="round")
    return logger


@cache
def _tell_offline(sweep_folder: Path) -> None:
    """Tells once a sweep where its runs are kept."""
    runs = sweep_folder / "*" / "wandb" / "offline-run-*"
    print(
        f"W&B: offline (no key, or WANDB_MODE says so); to send the runs later: wandb sync {runs}",
        file=sys.stderr,
    )
