"""Runs one cell, or with -m a sweep of them: python -m fedlight.run [-m] [KEY=VALUE ...]

In Python `fedlight.run([...])` runs one cell: the module is called like the function `fedlight.api.run`.
"""

import sys
from types import ModuleType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fedlight.hydra_command import run_hydra_command
from fedlight.single_cell import check_one_cell, run_or_skip


class CallableModule(ModuleType):
    """A module that is called like a function; as a submodule it hides a function of the same name."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Calls `fedlight.api.run`, which loads pandas; the command does without it."""
        from fedlight.api import run

        return run(*arguments, **keywords)


def main() -> None:
    """Exits with 0 for completed, 1 for failed in training, 2 for bad input."""
    sys.exit(run_hydra_command(check_and_run))


def check_and_run(composed: DictConfig) -> None:
    """Runs the cell; the configuration is validated before the heavy libraries are loaded."""
    from fedlight.config import validate

    command = DictConfig(HydraConfig.get())
    check_one_cell(command)
    config = validate(composed)
    if OmegaConf.select(command, "sweeper.dry"):
        from fedlight.experiment.plan_table import print_plan

        print_plan([config])
        return
    run_or_skip(config)


if __name__ == "__main__":
    main()
else:
    sys.modules[__name__].__class__ = CallableModule
