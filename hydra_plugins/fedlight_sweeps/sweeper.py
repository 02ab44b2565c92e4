"""The grid of a sweep, planned before its first cell starts."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedlight.runs.identity import cell_folder, is_done
from fedlight.runs.plan import Launch, PlannedCell, last_jobs
from fedlight.runs.reader import flat
from fedlight.runtime.errors import BadInput
from fedlight.runtime.lock import this_process
from fedlight.runtime.secret import masked, move_to_environment


class PlanningSweeper(BasicSweeper):
    """Hydra's own grid; every cell is composed once and planned, and those that are done are left out."""

    launch: Launch | None = None

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the grid; what Hydra writes of the configuration to `multirun.yaml` holds no secret."""
        self.config = OmegaConf.create(masked(OmegaConf.to_container(self.config)))
        return super().sweep(arguments)

    def _parse_config(self) -> list[str]:
        return move_to_environment(super()._parse_config(), os.environ)

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        """The next cells to run; one with a bad configuration is among them, so that its error is shown."""
        return [overrides for overrides in super().get_job_batch() if self._plan(list(overrides))]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Writes the plan; every cell was composed before."""
        if self.launch is None:
            return
        assert self.config is not None
        sweep = Path(self.config.hydra.sweep.dir)
        jobs = last_jobs(sweep)
        for cell, planned in self.launch.cells.items():
            planned.job = jobs.get(cell)
        self.launch.write(sweep)

    def _plan(self, overrides: list[str]) -> bool:
        """Plans a cell; returns whether it is to be launched."""
        from fedlight.config import validate

        assert self.config is not None
        assert self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            del config["hydra"]
        try:
            settings = validate(config)
        except (BadInput, OmegaConfBaseException):
            return True
        if self.launch is None:
            self.launch = Launch(sys.argv[1:], str(Path.cwd()), this_process())
        folder = cell_folder(settings)
        if folder.name in self.launch.cells:
            return False
        dumped = masked(settings.plain())
        self.launch.cells[folder.name] = PlannedCell(overrides, settings.rounds, config=flat(dumped))
        if done := is_done(folder):
            print(f"{folder.name}: done already, in {folder}")
        return not done
