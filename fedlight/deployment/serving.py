"""The server of a federation between institutions: it runs the cell of an agreement over Flower."""

from pathlib import Path
from typing import Any

from fedlight.deployment.agreement import hash_agreement
from fedlight.deployment.deployable import load_agreed_config
from fedlight.deployment.participants import set_up_server
from fedlight.experiment.cell import run_cell
from fedlight.federation.transport.transport import Deployment
from fedlight.runs.identity import cell_folder
from fedlight.runtime.lease import acquire_lease


def serve(grid: Any, path: Path, run_config: dict[str, Any]) -> None:
    """Runs the cell of an agreement inside a Flower ServerApp.

    Args:
        grid: Flower's way to the nodes.
        path: of the agreement.
        run_config: `output`, the folder for the cell's folder; `data-root`, images of the server's own to
            score with, or nothing.
    """
    config = load_agreed_config(path, str(run_config["data-root"]) or None)
    config = config.model_copy(update={"output": str(run_config["output"])})
    folder = cell_folder(config)
    with acquire_lease(folder) as lease:
        run_cell(config, lease, set_up_server, Deployment(grid, hash_agreement(path)))
