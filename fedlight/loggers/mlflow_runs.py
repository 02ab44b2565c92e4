"""MLflow: one run a cell, in the experiment of its sweep."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

from fedlight.loggers.run_setting import with_setting

CELL = "fedlight.cell"  # tag of a run
ROUND = "round"  # metric that is logged after the others of its round
STORE = "mlruns"  # in the sweep's folder


class CellMLflow(MLFlowLogger):
    """Lightning's logger with pictures and the result, by the names that `WandbLogger` has for them.

    Attributes:
        logged: the last round that an earlier process of the cell has logged.
    """

    logged = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None or step > self.logged:
            others = {key: value for key, value in metrics.items() if key != ROUND}
            super().log_metrics(others, step)
            super().log_metrics({ROUND: metrics[ROUND]}, step)

    def log_image(self, key: str, images: Sequence[str], step: int) -> None:
        """Logs PNG files as artifacts."""
        for path in images:
            self.experiment.log_artifact(self.run_id, path, key)

    def log_result(self, result: dict[str, Any]) -> None:
        """Logs `result.json` as an artifact."""
        self.experiment.log_dict(self.run_id, result, "result.json")


def mlflow_logger(
    folder: Path, sweep: str, cell: str, parameters: dict[str, Any], tracking_uri: str | None = None
) -> CellMLflow:
    """A run of the cell, looked up by its tag where an earlier process of the cell has begun it.

    Args:
        folder: of the cell.
        sweep: name of its sweep, which is the name of the experiment.
        cell: id of the cell, which is the name of the run.
        parameters: configuration of the cell with masked secrets.
        tracking_uri: address of a tracking server; None for files in `mlruns/` in the sweep's folder.
    """
    from mlflow.tracking import MlflowClient

    if tracking_uri is None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a data base needs more than mlflow-skinny
        tracking_uri = (folder.parent.absolute() / STORE).as_uri()
    client = MlflowClient(tracking_uri)
    experiment = _experiment(client, sweep)
    runs = client.search_runs([experiment], f"tags.`{CELL}` = '{cell}'", max_results=1)
    run = runs[0] if runs else client.create_run(experiment, tags={CELL: cell}, run_name=cell)
    logger = CellMLflow(sweep, tracking_uri=tracking_uri, run_id=run.info.run_id)
    logger.logged = int(run.data.metrics.get(ROUND, 0))
    client.update_run(run.info.run_id, "RUNNING")
    if not runs:
        logger.log_hyperparams(with_setting(parameters))
    return logger


def _experiment(client: Any, name: str) -> str:
    """The id of an experiment, which another cell of the sweep may create at the same time."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)
