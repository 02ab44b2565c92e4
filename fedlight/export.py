"""A trained model for diffusers: python -m fedlight.export runs/NAME/CELL [--client K] --out FOLDER"""

from pathlib import Path

from fedlight.runs.finished_arguments import finished_parser, refusing
from fedlight.runtime.errors import BadInput


def main() -> None:
    """Exits with 0, or with 2 for bad input."""
    parser = finished_parser(
        "export",
        "Writes a model of a finished cell for diffusers, with the code of its UNet beside the weights, so "
        "that it loads where fedlight is not installed.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    arguments = parser.parse_args()
    with refusing():
        export(arguments.cell, arguments.client, arguments.out, arguments.trust)


def export(folder: Path, client: int | None, out: Path, trust: bool) -> None:
    """Writes a model of a finished cell.

    Args:
        folder: of the cell.
        client: whose own model, or None for the federated one.
        out: the folder to write.
        trust: whether the cell's configuration may run whatever code it names.

    Raises:
        BadInput: no finished cell, no such model, or `out` is taken.
    """
    from fedlight.experiment.finished import open_cell

    cell = open_cell(folder, trust)
    state = cell.state(client)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out: {out} is there already, and not empty")
    from fedlight.experiment.pipeline import add_code, save_pipeline

    cell.module.load_state_dict(state)
    save_pipeline(out, cell.module)
    print(add_code(out))


if __name__ == "__main__":
    main()
