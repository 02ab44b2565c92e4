"""A trained model for diffusers: python -m fedlight.export runs/NAME/CELL [--client K] --out FOLDER"""

import sys
from pathlib import Path

from fedlight.command import cell_parser, run_command
from fedlight.runtime.errors import BadInput


def main() -> None:
    """Exits with 0, or with 2 for bad input."""
    parser = cell_parser(
        "export",
        "Writes a model of a finished cell for diffusers, with the code of its UNet beside the weights, so "
        "that it loads where fedlight is not installed.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must be new or empty")
    sys.exit(run_command(parser, export))


def export(cell: Path, client: int | None, out: Path, trust: bool) -> None:
    """Writes a model of a finished cell as a pipeline of diffusers.

    Args:
        cell: its folder.
        client: whose own model, or None for the federated one.
        out: the folder to write; new or empty.
        trust: whether the cell's configuration may run whatever code it names.

    Raises:
        BadInput: no finished cell, no such model, or `out` is not empty.
    """
    from fedlight.experiment.finished import open_cell

    pipeline = open_cell(cell, trust).model(client)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out: {out} is there already, and not empty; choose another folder, or empty it")
    from fedlight.experiment.pipeline import add_code, save_pipeline

    save_pipeline(out, pipeline)
    print(add_code(out))


if __name__ == "__main__":
    main()
