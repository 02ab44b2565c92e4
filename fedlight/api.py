"""The Python API: run a cell, read a sweep as a table, open a finished cell."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedlight.command import DEBUG, describe_error
from fedlight.reporting.cell_result import CellResult
from fedlight.runtime.errors import BadInput
from fedlight.runtime.signals import Interrupted


def run(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> CellResult:
    """Runs one cell, as `python -m fedlight.run OVERRIDES` does, or returns it at once where it is done.

    A cell that was interrupted continues after its last stored round. Progress is shown in the output of the
    notebook's cell or in the terminal. The CPU's random state and torch's number of threads are the same
    afterwards as before.

    Args:
        overrides: KEY=VALUE, as on the command line, such as `["method=UDEC", "clients=5"]`.
        config_dir: folder with configuration files of your own, such as `method/MINE.yaml`, as `--config-dir`
            on the command line.

    Returns:
        The completed cell.

    Raises:
        FedlightError: its message is one line. `BadInput`: the overrides are invalid, and nothing was
            written. `Diverged`: training left the finite numbers. `ExtensionFailed`: code of your own raised.
            `LeaseTaken`: another process works on the cell.
        KeyboardInterrupt: the cell was interrupted; the same call continues it.
    """
    if isinstance(overrides, str):
        raise BadInput(f'overrides must be a list, such as ["method=UDEC"], got {overrides!r}')
    from fedlight.single_cell import configure, run_or_skip

    try:
        warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm, when diffusers is imported
        config = configure(overrides, None if config_dir is None else Path(config_dir))
        return CellResult(run_or_skip(config))
    except BadInput as error:
        if DEBUG in os.environ:
            raise
        raise BadInput(describe_error(error)) from None  # the frames below say nothing to the user
    except Interrupted:
        raise KeyboardInterrupt("the cell was interrupted; the same call continues it") from None


def load(folder: str | Path, rounds: bool = False) -> pd.DataFrame:
    """Reads the cells of a sweep as a table; cells that are running or failed are rows, too.

    Args:
        folder: of a sweep, such as `runs/demo`, of a cell in it, or of several sweeps, such as `runs`.
        rounds: whether the table has a row for each round of each cell; otherwise it has a row for each cell.

    Returns:
        A row for each cell: `sweep`, `cell`, `status`; the settings `method`, `clients`, `partition`, `data`,
        `model`, `rounds`, `epochs`, `fraction`, `seed`, and each further key in which the cells differ;
        `fid`, `fid_std` and the further scores that some cell has, with the names of the report's
        `cells.csv`; `params` and `bytes` (exchanged, both ways, all rounds), `reduction` (share of the
        parameters saved against FULL, 0..1), `train_loss`, `seconds`; `note` (why a cell is not completed);
        `folder`.

        With `rounds` the same settings and the columns of `rounds.csv`: `round`, `train_loss`, `params_down`,
        `params_up`, `params_cumulative`, `bytes_cumulative`, `participants`, `reports`, `fid` (where it was
        measured), `seconds`, `epsilon` (under privacy).

    Raises:
        BadInput: the folder holds neither a sweep nor a cell.
    """
    from fedlight.reporting.frames import cells_frame, rounds_frame
    from fedlight.runs.status import find_cells

    cells = find_cells(Path(folder))
    if not cells:
        raise BadInput(f"{folder}: no cell here; a sweep is a folder OUTPUT/NAME, such as runs/demo")
    return rounds_frame(cells) if rounds else cells_frame(cells)
