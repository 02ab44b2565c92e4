"""A search for the cell with the best result, by Optuna, in place of a grid."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from fedlight.loggers.wandb_mode import runs_of_a_grid
from fedlight.runs.identity import read_result
from fedlight.runtime.errors import BadInput, CellFailed
from hydra_plugins.fedlight_sweeps.sweeper import Cells, PlanningSweeper


class OptunaSweeper(PlanningSweeper):
    """Cells in batches, each chosen by the results of those before.

    Nothing is kept but the cells: the same command asks for the same cells again, finds the results of those
    that are done, and goes on from there.

    Args:
        params: of the search: key: values, as on the command line, which precedes them.
        dry: not possible, since results decide which cells there are.
        n_trials: cells in all.
        n_jobs: cells in a batch.
        metric: dotted key of `result.json`.
        direction: minimize or maximize.
        seed: of the sampler.
    """

    def __init__(
        self,
        params: Mapping[str, str] | None,
        dry: bool,
        n_trials: int,
        n_jobs: int,
        metric: str,
        direction: str,
        seed: int,
    ) -> None:
        super().__init__(None, params, dry)
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.metric = metric
        self.direction = direction
        self.seed = seed

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the search and prints what it found.

        Raises:
            BadInput: Optuna is not installed, or a cell cannot be run as asked.
            CellFailed: a cell failed; the search went on without it.
        """
        if self.dry:
            raise BadInput("--dry: which cells a search runs follows from their results")
        try:
            import optuna
        except ImportError as error:
            raise BadInput("hydra/sweeper=optuna: pip install 'fedlight[optuna]'") from error
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
        space = {o.get_key_element(): _distribution(o) for o in overrides if o.is_sweep_override()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.seed)
        study = optuna.create_study(direction=self.direction, sampler=sampler)

        cells: Cells = {}
        failed: CellFailed | None = None
        while (left := self.n_trials - len(study.trials)) > 0:
            trials = [study.ask(space) for _ in range(min(left, self.n_jobs))]
            grid = [[*fixed, *(f"{key}={value}" for key, value in t.params.items())] for t in trials]
            new = {folder: cell for folder, cell in self.checked(grid).items() if folder not in cells}
            pending = self.plan(new, cells)
            cells |= new
            try:
                if pending:
                    with runs_of_a_grid():
                        self.launch(pending, len(cells) - len(new))
            except CellFailed as error:
                failed = error
            for trial, typed in zip(trials, grid, strict=True):
                value = self._value(self.places[tuple(typed)])
                state = optuna.trial.TrialState.FAIL if value is None else None
                study.tell(trial, value, state)
        if any(trial.value is not None for trial in study.trials):
            best = " ".join(f"{key}={value}" for key, value in study.best_params.items())
            print(f"best of {len(study.trials)}: {self.metric} {study.best_value:.4g} with {best}")
        if failed:
            raise failed

    def _value(self, folder: Path) -> float | None:
        """The metric of a cell; None where it has none."""
        found: Any = read_result(folder)
        for key in self.metric.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return None if found is None else float(found)


def _distribution(override: Override) -> Any:
    """What Optuna draws a key from: an interval, log-uniform with tag(log, ...), or listed values."""
    from optuna import distributions

    values = override.value()
    if not isinstance(values, IntervalSweep):
        return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
    low, high, log = values.start, values.end, "log" in values.tags
    whole = {type(low), type(high)} == {int}
    make = distributions.IntDistribution if whole else distributions.FloatDistribution
    return make(low, high, log)
