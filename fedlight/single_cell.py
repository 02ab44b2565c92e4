"""One cell, for the command `fedlight.run` and for Python: checked, skipped where it is done, else run."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedlight.command import describe_error
from fedlight.compose import compose_command
from fedlight.config import CellConfig, validate
from fedlight.hydra_command import check_utf8
from fedlight.overrides import keep_text
from fedlight.runs.identity import cell_folder, is_done, print_done
from fedlight.runtime.environment import load_environment
from fedlight.runtime.errors import BadInput, FedlightError, raised_by_hydra
from fedlight.runtime.lease import acquire_lease
from fedlight.runtime.memory import pause_garbage_collection
from fedlight.runtime.secret import move_to_environment


def configure(overrides: Sequence[str], config_dir: Path | None = None) -> CellConfig:
    """The configuration of one cell from what is typed in Python, composed and validated as a command's.

    Args:
        overrides: KEY=VALUE, as on the command line.
        config_dir: folder of further configuration files; None for none.

    Raises:
        BadInput: an override is invalid, or stands for several cells.
    """
    check_utf8(overrides)
    for override in overrides:
        if override.startswith("-"):
            raise BadInput(f"{override} is an option of the command; overrides are KEY=VALUE")
    if config_dir is not None and not config_dir.is_dir():
        raise BadInput(f"config_dir: no folder {config_dir}")
    load_environment()
    typed = keep_text(move_to_environment(overrides, os.environ))
    try:
        for parsed in OverridesParser.create().parse_overrides(typed):
            if parsed.is_sweep_override():
                raise BadInput(
                    f"{parsed.input_line} stands for several cells: run them one by one in a loop, or "
                    "all by the command python -m fedlight.run -m"
                )
        composed = compose_command(typed, config_dir)
        check_one_cell(composed.hydra)
        with open_dict(composed):
            del composed["hydra"]
        return validate(composed)
    except FedlightError:
        raise
    except Exception as error:
        if isinstance(error, HydraException | OmegaConfBaseException) or raised_by_hydra(error):
            raise BadInput(describe_error(error)) from error
        raise


def run_or_skip(config: CellConfig) -> Path:
    """Runs a cell, unless it is done; the heavy libraries are loaded only if it has to be run.

    Args:
        config: of the cell, validated.

    Returns:
        The folder of the completed cell.

    Raises:
        BadInput: the cell cannot be run as configured; nothing was written.
        Diverged: a client's loss left the finite numbers.
        LeaseTaken: another process works on the cell.
    """
    begun = time.perf_counter()
    folder = cell_folder(config)
    if is_done(folder):
        print_done(folder)
        return folder
    with acquire_lease(folder) as lease:
        with pause_garbage_collection():
            from fedlight.experiment.cell import run_cell

        with _restore_torch():
            run_cell(config, lease, begun=begun)
    return folder


def check_one_cell(command: DictConfig) -> None:
    """Raises BadInput where a single cell is to be run (no -m) and the configuration is of several.

    Args:
        command: Hydra's own part of the configuration.
    """
    if command.mode != RunMode.MULTIRUN and command.runtime.choices.get("hydra/sweeper") == "optuna":
        raise BadInput("hydra/sweeper=optuna is a search of several cells: add -m to the command")
    chosen = {override.lstrip("+").partition("=")[0] for override in command.overrides.task}
    open_keys = [key for key in OmegaConf.select(command, "sweeper.params") or () if key not in chosen]
    if command.mode != RunMode.MULTIRUN and open_keys:
        grid = f"sweeps={command.runtime.choices.get('sweeps') or '...'}"
        raise BadInput(
            f"{grid} is a grid of several cells: add -m to the command to run them all, "
            f"or choose one by {' '.join(f'{key}=...' for key in open_keys)}"
        )


@contextmanager
def _restore_torch() -> Iterator[None]:
    """Restores the CPU's random state and the number of threads, which a cell sets for the whole process."""
    import torch
    from lightning.pytorch.utilities.seed import isolate_rng

    threads = torch.get_num_threads()
    try:
        with isolate_rng(include_cuda=False):  # asking for a GPU's state would start CUDA on all of them
            yield
    finally:
        torch.set_num_threads(threads)
