"""The sample grid of a round: a row for each client's model, or all images of the global model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlight.config import CellConfig
from fedlight.experiment.model_evaluation import ModelEvaluation
from fedlight.loggers import pictures

MAX_CLIENTS = 10  # rows, where clients' own models are evaluated


def grid_path(folder: Path, round_: int) -> Path:
    """The file of a round's sample grid in a cell's folder."""
    return folder / "samples" / f"round_{round_:03d}.png"


def draw_sample_grid(
    folder: Path,
    round_: int,
    config: CellConfig,
    classes: Sequence[str],
    evaluations: Mapping[int | None, ModelEvaluation],
) -> None:
    """Writes the sample grid of a round.

    In the grid of a conditional model each column shows one class, where there are at most COLUMNS of them.

    Args:
        folder: of the cell.
        round_: the round after which the models were evaluated.
        config: of the cell.
        classes: the class names of the data set.
        evaluations: client -> evaluation of its own model; None -> that of the global model.
    """
    headings = classes if config.model.conditional and len(classes) <= pictures.COLUMNS else ()
    width = len(headings) if headings and config.method.evaluate == "clients" else None  # one row a client
    rows = [
        (_row_label(client, evaluation.metrics), evaluation.grid[:width])
        for client, evaluation in list(evaluations.items())[:MAX_CLIENTS]
    ]
    title = f"{config.method.name}, {config.clients} clients, after round {round_}"
    if headings:
        title += "; each column is conditioned on its class"
    pictures.sample_grid(grid_path(folder, round_), rows, title, headings)


def _row_label(client: int | None, metrics: dict[str, float]) -> str:
    lines = [] if client is None else [f"client {client}"]
    return "\n".join([*lines, f"FID {metrics['fid']:.1f}"] if metrics else lines)
