"""What a cell records: `result.json` before its first round, and the row of each round."""

import platform
from importlib.metadata import version
from typing import Any

from fedlight.config import CellConfig
from fedlight.federation.server import Outcome, Server
from fedlight.runs.identity import SCHEMA
from fedlight.runtime.machine import describe_machine

LIBRARIES = ("fedlight", "torch", "lightning", "diffusers", "torch-fidelity", "hydra-core", "numpy")
SECONDS = ("total", "training", "merging", "evaluation", "checkpoint", "startup", "sampling")
"""Where the time of a cell goes; see docs/evaluation.md."""
FEW_CLIENTS = 20  # whose losses are logged one by one


def blank_result(cell: str, config: CellConfig, server: Server, precision: str) -> dict[str, Any]:
    """`result.json` before the first round; `precision` is that of the clients' Trainers."""
    return {
        "schema": SCHEMA,
        "status": "failed",
        "cell": cell,
        "name": config.name,
        "method": config.method.name,
        "clients": config.clients,
        "rounds": config.rounds,
        "epochs": config.epochs,
        "fraction": config.fraction,
        "seed": config.seed,
        "data": config.data.name,
        "partition": config.partition.name,
        "model": config.model.name,
        "model_params": server.model_params,
        "slices": server.slice_params(),
        "exchange": server.ledger.totals(server.model_params),
        "train_loss": None,
        "fid": None,
        "state_sha256": None,
        "client_sha256": [],
        "seconds": dict.fromkeys(SECONDS, 0.0),
        "memory": None,
        "flops": None,
        **describe_here(precision),
        "error": None,
    }


def describe_here(precision: str) -> dict[str, Any]:
    """The entries `versions` and `machine` of a result; `precision` is that of the clients' Trainers."""
    return {
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "machine": describe_machine() | {"precision": precision},
    }


def score_columns(fid: dict[str, Any] | None) -> dict[str, float | None]:
    """The scores in a row of `rounds.csv`; None where nothing was scored."""
    entry = fid or {}
    downstream = entry.get("downstream_accuracy") or {}
    return {
        "fid": entry.get("value"),
        "density": entry.get("density"),
        "coverage_knn": entry.get("coverage_knn"),
        "downstream_accuracy": downstream.get("generated"),
    }


def round_record(
    outcome: Outcome, seconds: float, server: Server, fid: dict[str, Any] | None, config: CellConfig
) -> dict[str, Any]:
    """What is recorded of a round: its row of `rounds.csv`, its losses and its scores.

    Args:
        outcome: of the round.
        seconds: that training and merging took.
        server: after the round.
        fid: the scores, where models were evaluated after the round.
        config: of the cell.
    """
    totals = server.ledger.totals(server.model_params)
    row = {
        "round": outcome.round,
        "train_loss": outcome.train_loss,
        "params_down": sum(entry.params for entry in outcome.exchange if entry.direction == "down"),
        "params_up": sum(entry.params for entry in outcome.exchange if entry.direction == "up"),
        "params_cumulative": totals["params_total"],
        "bytes_cumulative": totals["bytes_total"],
        "participants": outcome.cohort,
        "reports": outcome.reports,
        **score_columns(fid),
        "seconds": round(seconds, 3),
    }
    losses = {str(client): loss for client, loss in outcome.client_losses.items()}
    return {"row": row, "client_losses": losses if config.clients <= FEW_CLIENTS else {}, "fid": fid}
