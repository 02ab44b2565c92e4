"""The grid of a sweep, checked and planned as a whole before its first cell starts."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from fedlight.command import describe_error
from fedlight.config import CellConfig, validate
from fedlight.loggers.wandb_mode import runs_of_a_grid
from fedlight.overrides import keep_text
from fedlight.reporting.terminal import summarise_at_end
from fedlight.runs.identity import cell_folder, is_done, print_done
from fedlight.runs.plan import LISTED, Launch, PlannedCell, last_jobs
from fedlight.runs.reader import flat
from fedlight.runtime.errors import BadInput, raised_by_hydra
from fedlight.runtime.lease import this_process
from fedlight.runtime.secret import masked, move_to_environment


class Checked(NamedTuple):
    """A cell that can be run as asked, and whether that was done before: its files are hashed once for it."""

    overrides: list[str]
    config: CellConfig
    done: bool


Cells = dict[Path, Checked]
"""Cells by their folders."""


def _check_listed(config: CellConfig) -> None:
    """Checks a cell of `fedlight.sweeps retry`, whose plan may come from elsewhere.

    Raises:
        BadInput: it would call what fedlight does not list, or lie in another folder than the sweep's.
    """
    if (sweep := os.environ.get(LISTED)) is None:
        return
    from fedlight.experiment.targets import check_targets

    try:
        check_targets(config.plain())
        if Path(config.output, config.name).resolve() != Path(sweep):
            raise BadInput(f"output={config.output} name={config.name} is not the folder {sweep}")
    except BadInput as error:
        raise BadInput(f"{error}; --trust runs it, so know where the sweep is from") from error


class PlanningSweeper(BasicSweeper):
    """Hydra's own grid; all cells are checked before one is launched, and those that are done are left out.

    Args:
        max_batch_size: cells handed to the launcher at once; None for all.
        params: of the grid: key: values, as on the command line, which precedes them.
        dry: print the plan instead of running it.
    """

    def __init__(
        self, max_batch_size: int | None, params: Mapping[str, str] | None = None, dry: bool = False
    ) -> None:
        super().__init__(max_batch_size, dict(params or {}))
        self.dry = dry
        self.places: dict[tuple[str, ...], Path] = {}  # the folder of the cell with these overrides
        self.process = this_process()

    def _parse_config(self) -> list[str]:
        return keep_text(move_to_environment(super()._parse_config(), os.environ))

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the cells of the sweep that are not done, and prints its table at the end.

        Raises:
            BadInput: as `run_cells` does.
        """
        assert self.config is not None
        with summarise_at_end(Path(self.config.hydra.sweep.dir)):
            return self.run_cells(arguments)

    def run_cells(self, arguments: list[str]) -> Any:
        """Runs the cells of the grid that are not done.

        Raises:
            BadInput: a cell cannot be run as asked; the message names every such cell, and none was run.
        """
        cells = self.checked(self.grid(arguments))
        if self.dry:
            from fedlight.experiment.estimate import print_plan

            print_plan([cell.config for cell in cells.values()])
            return None
        pending = self.plan(cells)
        size = self.max_batch_size or max(1, len(pending))
        batches = [(pending[first : first + size], first) for first in range(0, len(pending), size)]
        with runs_of_a_grid() if len(cells) > 1 else nullcontext():
            return [self.launch(batch, first) for batch, first in batches]

    def grid(self, arguments: list[str]) -> list[list[str]]:
        """The overrides of each cell that the parameters of the sweep and the arguments stand for.

        Raises:
            BadInput: a key is swept over no value, as `method=glob(X*)` is.
        """
        (grid,) = self.split_arguments(self.parsed(arguments), None)
        return [keep_text(cell) for cell in grid]

    def parsed(self, arguments: list[str]) -> list[Override]:
        """The parameters of the sweep and the arguments, parsed.

        Raises:
            BadInput: a key is swept over no value, as `method=glob(X*)` is.
        """
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        for override in overrides:
            if override.is_discrete_sweep() and not list(override.sweep_string_iterator()):
                raise BadInput(f"{override.input_line} stands for no value")
        return overrides

    def checked(self, grid: Sequence[list[str]]) -> Cells:
        """The cells of a grid by their folders, each once; those that are not done are built as a trial.

        Raises:
            BadInput: some cannot be run as asked; the message names each of them.
        """
        cells, bad = self.examine(grid)
        if bad:
            shared = set(grid[0]).intersection(*grid[1:]) if len(grid) > 1 else set()
            named = [
                f"[{' '.join(o for o in overrides if o not in shared)}] {text}" for overrides, text in bad
            ]
            count = f"{len(bad)} of {len(grid)} cells cannot be run, so none was: " if len(grid) > 1 else ""
            raise BadInput(f"{count}{'; '.join(named)}")
        return cells

    def examine(self, grid: Sequence[list[str]]) -> tuple[Cells, list[tuple[list[str], str]]]:
        """The cells of a grid that can be run, as `checked` has them; and the others, each with the reason.

        Raises:
            BadInput: the folder of the sweep was set by itself.
        """
        assert self.config is not None
        output = os.path.expanduser(str(self.config.output))
        if Path(self.config.hydra.sweep.dir) != Path(output, str(self.config.name)):
            raise BadInput("hydra.sweep.dir cannot be set: a sweep lives in OUTPUT/NAME; set output or name")
        elsewhere = "slurm" in self.config.hydra.launcher._target_
        cells: Cells = {}
        bad: list[tuple[list[str], str]] = []
        for overrides in grid:
            try:
                config = self.compose(overrides)
                _check_listed(config)
                folder = self.places[tuple(overrides)] = cell_folder(config)
                if folder in cells:
                    continue
                done = is_done(folder)
                if not done:
                    from fedlight.experiment.setup import check

                    check(config, elsewhere)
                cells[folder] = Checked(overrides, config, done)
            except (BadInput, HydraException, OmegaConfBaseException) as error:
                bad.append((overrides, describe_error(error)))
        return cells, bad

    def compose(self, overrides: Sequence[str]) -> CellConfig:
        """The configuration of a cell with these overrides, checked.

        Raises:
            BadInput, HydraException, OmegaConfBaseException: they make no valid configuration.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        try:
            config = loader.load_sweep_config(self.config, list(overrides))
        except Exception as error:
            if raised_by_hydra(error):
                raise BadInput(describe_error(error)) from error
            raise
        with open_dict(config):
            del config["hydra"]
        return validate(config)

    def plan(self, cells: Cells, earlier: Cells | None = None) -> list[list[str]]:
        """Writes the plan, with cells of earlier batches; returns the overrides of those to be launched."""
        assert self.config is not None
        sweep = Path(self.config.hydra.sweep.dir)
        jobs = last_jobs(sweep)
        launch = Launch(sys.argv[1:], str(Path.cwd()), self.process)
        pending = []
        for folder, cell in {**(earlier or {}), **cells}.items():
            config = flat(masked(cell.config.plain()))
            job = jobs.get(folder.name)
            launch.cells[folder.name] = PlannedCell(cell.overrides, cell.config.rounds, job, config)
        launch.write(sweep)
        for folder, cell in cells.items():
            if cell.done:
                print_done(folder)
            else:
                pending.append(cell.overrides)
        return pending

    def launch(self, batch: Sequence[list[str]], first: int) -> Sequence[JobReturn]:
        """Launches cells, the first of which is the `first` of this command; raises what a cell raised."""
        assert self.launcher is not None
        ends = self.launcher.launch(batch, initial_job_idx=first)
        for end in ends:
            _ = end.return_value
        return ends
