"""Goes on with a finished cell: python -m fedlight.extend [-m] runs/NAME/CELL rounds=N [KEY=VALUE ...]"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlight.command import run_command
from fedlight.hydra_command import end_workers
from fedlight.reporting.terminal import summarise_at_end
from fedlight.runs.identity import cell_folder, is_done, print_done
from fedlight.runtime.environment import load_environment
from fedlight.runtime.errors import BadInput
from fedlight.runtime.lease import acquire_lease
from fedlight.runtime.memory import pause_garbage_collection
from fedlight.runtime.secret import move_to_environment
from fedlight.runtime.signals import EXIT, Interrupted


def main() -> None:
    """Exits with 0, 1 where training fails, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m fedlight.extend",
        description="Trains a finished cell longer. The result is a new cell beside it, equal bit by bit to "
        "a cell that had so many rounds from the start.",
    )
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="extend all cells of a sweep, runs/NAME"
    )
    parser.add_argument("cell", type=Path, help="the cell's folder, runs/NAME/CELL")
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="KEY=VALUE",
        help="rounds=N, more than the cell has; and keys that change no result, such as trainer.workers=2",
    )
    parser.add_argument(
        "--trust", action="store_true", help="run whatever code the cell's configuration names"
    )
    load_environment()
    sys.argv[1:] = move_to_environment(sys.argv[1:], os.environ)
    sys.exit(run_command(parser, extend))


def extend(cell: Path, overrides: list[str], multirun: bool, trust: bool) -> int:
    """Goes on with a finished cell, or with all finished cells of a sweep, up to a larger number of rounds.

    Args:
        cell: folder of the cell, or of the sweep.
        overrides: `rounds=N`, and keys that change no result.
        multirun: whether the folder is that of a sweep.
        trust: whether the cells' configurations may run whatever code they name.

    Returns:
        The exit status: 130 or 143 after a signal.

    Raises:
        BadInput: a cell cannot be extended; none was.
    """
    cell = Path(os.path.abspath(cell))  # which has a name, also where `.` was typed
    try:
        if not multirun:
            _extend([cell], overrides, trust)
            return 0
        cells = sorted(path.parent for path in cell.glob("[!.]*/result.json"))
        if not cells:
            raise BadInput(f"{cell} holds no finished cell; a sweep is a folder such as runs/NAME")
        with summarise_at_end(cell):
            _extend(cells, overrides, trust)
    except (Interrupted, KeyboardInterrupt) as interrupted:
        print("fedlight: interrupted; the same command goes on from here", file=sys.stderr)
        return int(getattr(interrupted, "status", EXIT + signal.SIGINT))
    finally:
        end_workers()
    return 0


def _extend(cells: Sequence[Path], overrides: list[str], trust: bool) -> None:
    """Extends cells one after the other, after all of them were checked."""
    from fedlight.experiment.extended import extended_configs

    configs = extended_configs(cells, overrides, trust)
    for config, shorter in configs:
        folder = cell_folder(config)
        if is_done(folder):
            print_done(folder)
            continue
        with acquire_lease(folder) as lease:
            with pause_garbage_collection():
                from fedlight.experiment.cell import run_cell
            run_cell(config, lease, shorter=shorter)


if __name__ == "__main__":
    main()
