"""Runs one cell, or with -m a sweep of them: python -m fedlight.run [-m] [KEY=VALUE ...]"""

import sys
import time

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fedlight.hydra_command import run_hydra_command
from fedlight.runs.identity import cell_folder, is_done, print_done
from fedlight.runtime.errors import BadInput
from fedlight.runtime.lease import acquire_lease
from fedlight.runtime.memory import pause_garbage_collection


def main() -> None:
    """Exits with 0 for completed, 1 for failed in training, 2 for bad input."""
    sys.exit(run_hydra_command(check_and_run))


def check_and_run(composed: DictConfig) -> None:
    """Runs the cell; the configuration is validated before the heavy libraries are loaded."""
    begun = time.perf_counter()
    from fedlight.config import validate

    command = DictConfig(HydraConfig.get())
    check_one_cell(command)
    config = validate(composed)
    if OmegaConf.select(command, "sweeper.dry"):
        from fedlight.experiment.plan_table import print_plan

        print_plan([config])
        return
    folder = cell_folder(config)
    if is_done(folder):
        print_done(folder)
        return
    with acquire_lease(folder) as lease:
        with pause_garbage_collection():
            from fedlight.experiment.cell import run_cell

        run_cell(config, lease, begun=begun)


def check_one_cell(command: DictConfig) -> None:
    """Raises BadInput where a single cell is to be run (no -m) and the configuration names a grid of several.

    Args:
        command: Hydra's own part of the configuration.
    """
    chosen = {override.lstrip("+").partition("=")[0] for override in command.overrides.task}
    open_keys = [key for key in OmegaConf.select(command, "sweeper.params") or () if key not in chosen]
    if command.mode == RunMode.RUN and open_keys:
        grid = f"sweeps={command.runtime.choices.get('sweeps') or '...'}"
        raise BadInput(
            f"{grid} is a grid of several cells: add -m to run them all, or choose one by "
            f"{' '.join(f'{key}=...' for key in open_keys)}"
        )


if __name__ == "__main__":
    main()
