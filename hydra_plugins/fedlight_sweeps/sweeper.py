"""The grid of a sweep: all cells are checked and planned before the first one starts."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedlight.command import describe_error
from fedlight.config import CellConfig, validate
from fedlight.loggers.wandb_mode import runs_of_a_grid
from fedlight.overrides import keep_text
from fedlight.reporting.terminal import summarise_at_end
from fedlight.runs.beginnings import order_by_rounds
from fedlight.runs.identity import cell_folder, is_done, print_done
from fedlight.runs.plan import LISTED, Launch, PlannedCell, read_last_jobs
from fedlight.runs.reader import flatten
from fedlight.runtime.errors import BadInput, CellFailed, raised_by_hydra
from fedlight.runtime.process_record import describe_this_process
from fedlight.runtime.secret import masked, move_to_environment


class Checked(NamedTuple):
    """A cell with a valid configuration; whether it is completed is known from the hashes of its files."""

    overrides: list[str]
    config: CellConfig
    done: bool


Cells = dict[Path, Checked]
"""Cells by their folders."""


def _check_listed(config: CellConfig) -> None:
    """Checks a cell of `fedlight.sweeps retry`, whose plan may come from an untrusted source.

    Raises:
        BadInput: the cell would call a target that is not listed, or lie outside the sweep's folder.
    """
    if (sweep := os.environ.get(LISTED)) is None:
        return
    from fedlight.experiment.targets import check_targets, check_tracking

    try:
        check_targets(config.plain())
        check_tracking(config.plain())
        if Path(config.output, config.name).resolve() != Path(sweep):
            raise BadInput(f"output={config.output} name={config.name} is not the folder {sweep}")
    except BadInput as error:
        raise BadInput(f"{error}; --trust runs it, so know where the sweep is from") from error


class PlanningSweeper(Sweeper):
    """A grid as Hydra's basic sweeper expands it; all cells are checked before the first is launched.

    Completed cells are skipped.

    Args:
        max_batch_size: maximum number of cells that the launcher gets at once; None for all.
        params: of the grid: key: values, as on the command line, whose values take precedence.
        dry: print the plan instead of running it.
    """

    def __init__(
        self, max_batch_size: int | None, params: Mapping[str, str] | None = None, dry: bool = False
    ) -> None:
        self.max_batch_size = max_batch_size
        self.params = dict(params or {})
        self.dry = dry
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.places: dict[tuple[str, ...], Path] = {}  # the folder of the cell with these overrides
        self.process = describe_this_process()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

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
            BadInput: some cells have invalid configurations; the message names each, and no cell was run.
        """
        cells = self.checked(self.grid(arguments))
        if self.dry:
            from fedlight.experiment.plan_table import print_plan

            print_plan([cell.config for cell in cells.values()])
            return None
        pending = self.plan(cells)
        with runs_of_a_grid() if len(cells) > 1 else nullcontext():
            return self.launch_in_order(cells, pending, 0)

    def launch_in_order(
        self, cells: Cells, pending: list[list[str]], first: int
    ) -> list[Sequence[JobReturn]]:
        """Launches cells, those first that longer ones go on from; SLURM is handed them with that order.

        Args:
            cells: all cells of the grid.
            pending: the overrides of those to be run.
            first: number of the first one in this command.

        Raises:
            CellFailed: some cells failed; all were launched.
        """
        assert self.config is not None
        named = {self.places[tuple(overrides)]: overrides for overrides in pending}
        groups: list[list[Path]] = [list(named)]
        if "slurm" not in self.config.hydra.launcher._target_:
            groups = order_by_rounds(
                {folder: flatten(masked(cells[folder].config.plain())) for folder in named}
            )
        ends, failed = [], None
        for group in groups:
            size = self.max_batch_size or max(1, len(group))
            for start in range(0, len(group), size):
                batch = [named[folder] for folder in group[start : start + size]]
                try:
                    ends.append(self.launch(batch, first))
                except CellFailed as error:
                    failed = failed or error
                first += len(batch)
        if failed is not None:
            raise failed
        return ends

    def grid(self, arguments: list[str]) -> list[list[str]]:
        """The overrides of each cell: all combinations of the swept values; the last of equal keys counts.

        Raises:
            BadInput: a key is swept over no value, as in `method=glob(X*)`, or over an interval.
        """
        choices: dict[str, list[str]] = {}
        for override in self.parse(arguments):
            key = override.get_key_element()
            if override.is_sweep_override():
                if not override.is_discrete_sweep():
                    raise BadInput(
                        f"{override.input_line}: a grid takes listed values, such as {key}=1,2; "
                        "hydra/sweeper=optuna draws from an interval"
                    )
                choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            else:
                choices[key] = [f"{key}={override.get_value_element_as_str()}"]
        return [keep_text(list(cell)) for cell in product(*choices.values())]

    def parse(self, arguments: list[str]) -> list[Override]:
        """Parses the parameters of the sweep and the arguments.

        Raises:
            BadInput: a key is swept over no value, as in `method=glob(X*)`.
        """
        assert self.hydra_context is not None
        params = [f"{key}={values}" for key, values in self.params.items()]
        params = keep_text(move_to_environment(params, os.environ))
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*params, *arguments])
        for override in overrides:
            if override.is_discrete_sweep() and not list(override.sweep_string_iterator()):
                raise BadInput(f"{override.input_line} stands for no value")
        return overrides

    def checked(self, grid: Sequence[list[str]]) -> Cells:
        """The cells of a grid by their folders, without duplicates; those to be run are set up as a check.

        Raises:
            BadInput: some cells are invalid; the message names each of them.
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
        """The valid cells of a grid, as `checked` returns them, and the invalid ones, each with the reason.

        Raises:
            BadInput: hydra.sweep.dir is set.
        """
        assert self.config is not None
        output = os.path.expanduser(str(self.config.output))
        if Path(self.config.hydra.sweep.dir) != Path(output, str(self.config.name)):
            raise BadInput("hydra.sweep.dir cannot be set: a sweep lives in OUTPUT/NAME; set output or name")
        on_cluster = "slurm" in self.config.hydra.launcher._target_
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
                    from fedlight.experiment.trial import check

                    check(config, on_cluster)
                cells[folder] = Checked(overrides, config, done)
            except (BadInput, HydraException, OmegaConfBaseException) as error:
                bad.append((overrides, describe_error(error)))
        return cells, bad

    def compose(self, overrides: Sequence[str]) -> CellConfig:
        """Composes and validates the configuration of a cell.

        Raises:
            BadInput, HydraException, OmegaConfBaseException: the overrides are invalid.
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
        """Writes the plan of these and earlier cells; returns the overrides of the cells to be run."""
        assert self.config is not None
        sweep = Path(self.config.hydra.sweep.dir)
        jobs = read_last_jobs(sweep)
        launch = Launch(sys.argv[1:], str(Path.cwd()), self.process)
        pending = []
        for folder, cell in {**(earlier or {}), **cells}.items():
            config = flatten(masked(cell.config.plain()))
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
        """Launches cells, numbered from `first` in this command; raises the first error of a cell."""
        assert self.launcher is not None
        ends = self.launcher.launch(batch, initial_job_idx=first)
        for end in ends:
            _ = end.return_value
        return ends
