"""A search for the cell with the best result by Optuna, instead of a grid."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf

from fedlight.config import SCHEMA_KEYS, WHOLE_KEYS
from fedlight.loggers.wandb_mode import runs_of_a_grid
from fedlight.overrides import keep_text
from fedlight.runs.reader import Result, read_numbers
from fedlight.runtime.errors import BadInput, CellFailed
from fedlight.runtime.files import atomic
from hydra_plugins.fedlight_sweeps.sweeper import Cells, PlanningSweeper

DIRECTIONS = ("minimize", "maximize")
SUMMARY = "search.json"  # in the sweep's folder


def _importance(study: Any) -> dict[str, float]:
    """Share of each key in the variance of the metric, 0..1 (fANOVA); empty where it cannot be computed."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    try:
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
        return {key: float(share) for key, share in shares.items()}
    except (ImportError, RuntimeError, ValueError):  # too few trials, or all of them alike
        return {}


class OptunaSweeper(PlanningSweeper):
    """Runs cells in batches, each drawn from the results of the batches before.

    The cells decide how a search goes on: the same command draws the same cells again, reads the results of
    completed ones and continues from there. After each batch `search.json` in the sweep's folder has the
    trials, the best one, and the importance of each key.

    Args:
        params: of the search: key: values, as on the command line, whose values take precedence.
        dry: rejected, since the cells depend on results.
        n_trials: number of cells.
        n_jobs: number of cells in a batch.
        metric: dotted key of a number in `result.json`.
        direction: minimize or maximize.
        seed: of the sampler.
        seeds: of the cells of a trial, whose mean metric counts; None for one cell of the configured seed.
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
        seeds: Sequence[int] | None = None,
    ) -> None:
        super().__init__(None, params, dry)
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.metric = metric
        self.direction = direction
        self.seed = seed
        self.seeds = seeds

    def run_cells(self, arguments: list[str]) -> Any:
        """Runs the search and prints its best cell.

        A cell that is invalid or fails counts as a failed trial, and the search continues.

        Raises:
            BadInput: Optuna is not installed, the search is invalid, no completed cell has the metric, or all
                cells are invalid.
            CellFailed: some cells failed or are invalid.
        """
        if self.dry:
            raise BadInput("--dry: which cells a search runs follows from their results")
        try:
            import optuna
        except ImportError as error:
            raise BadInput("hydra/sweeper=optuna: pip install 'fedlight[optuna]'") from error
        self._check_settings()
        overrides = self.parse(arguments)
        fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
        space = {o.get_key_element(): self._distribution(o) for o in overrides if o.is_sweep_override()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.seed)
        study = optuna.create_study(direction=self.direction, sampler=sampler)

        cells: Cells = {}
        refused: dict[str, str] = {}
        failed: CellFailed | None = None
        while (left := self.n_trials - len(study.trials)) > 0:
            trials = [study.ask(space) for _ in range(min(left, self.n_jobs))]
            chosen = [[f"{key}={value}" for key, value in trial.params.items()] for trial in trials]
            groups = [self._with_seeds(keep_text([*fixed, *drawn])) for drawn in chosen]
            valid, bad = self.examine([cell for group in groups for cell in group])
            reasons = {tuple(cell): reason for cell, reason in bad}
            new = {folder: cell for folder, cell in valid.items() if folder not in cells}
            pending = self.plan(new, cells) if new else []
            cells |= new
            try:
                if pending:
                    with runs_of_a_grid():
                        self.launch_in_order(cells, pending, len(cells) - len(new))
            except CellFailed as error:
                failed = error
            self._check_metric(cells)
            for trial, group, drawn in zip(trials, groups, chosen, strict=True):
                value = None
                if reason := next((reasons[tuple(cell)] for cell in group if tuple(cell) in reasons), None):
                    name = " ".join(drawn)
                    if refused.setdefault(name, reason) is reason:
                        print(
                            f"fedlight: [{name}] fails, as it cannot be run: {reason}",
                            file=sys.stderr,
                        )
                else:
                    folders = [self.places[tuple(cell)] for cell in group]
                    trial.set_user_attr("cells", [folder.name for folder in folders])
                    value = self._mean(folders)
                study.tell(trial, value, optuna.trial.TrialState.FAIL if value is None else None)
            if cells:
                self._write_summary(study)
        if not cells:
            named = "; ".join(f"[{name}] {reason}" for name, reason in refused.items())
            raise BadInput(f"none of the {self.n_trials} cells of the search can be run: {named}")
        if any(trial.value is not None for trial in study.trials):
            best = " ".join(f"{key}={value}" for key, value in study.best_params.items())
            print(f"best of {len(study.trials)}: {self.metric} {study.best_value:.4g} with {best}")
            if importance := _importance(study):
                print("importance: " + ", ".join(f"{key} {share:.0%}" for key, share in importance.items()))
        if failed or refused:
            raise failed or CellFailed(1)

    def _check_settings(self) -> None:
        assert self.config is not None
        for key in ("n_trials", "n_jobs"):
            if not isinstance(number := getattr(self, key), int) or number < 1:
                raise BadInput(f"hydra.sweeper.{key} must be a whole number above 0, got {number!r}")
        if self.direction not in DIRECTIONS:
            allowed = " or ".join(DIRECTIONS)
            raise BadInput(f"hydra.sweeper.direction must be {allowed}, got {self.direction!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise BadInput(f"hydra.sweeper.seed must be a whole number from 0 to 2^32 - 1, got {self.seed!r}")
        seeds = self.seeds
        if seeds is not None and (
            not isinstance(seeds, Sequence)
            or not seeds
            or not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
            or len(set(seeds)) < len(seeds)
        ):
            raise BadInput(f"hydra.sweeper.seeds must be null or a list of different seeds, got {seeds!r}")
        first = str(self.metric).split(".")[0]
        close = get_close_matches(first, Result.model_fields, n=1)
        if close and first != close[0]:
            raise BadInput(f"hydra.sweeper.metric={self.metric}: did you mean {close[0]}?")
        if first == "fid" and OmegaConf.select(self.config, "evaluation.samples") == 0:
            raise BadInput(
                f"hydra.sweeper.metric={self.metric}: evaluation.samples=0 leaves cells without scores; "
                "set it above 0, or search by hydra.sweeper.metric=train_loss"
            )

    def _check_metric(self, cells: Cells) -> None:
        """Raises BadInput if cells are completed and none has the metric."""
        completed = [numbers for folder in cells if (numbers := read_numbers(folder)) is not None]
        if completed and not any(self.metric in numbers for numbers in completed):
            raise BadInput(
                f"hydra.sweeper.metric={self.metric}: no completed cell has a number of that name; there are "
                f"{', '.join(completed[0])}"
            )

    def _with_seeds(self, overrides: list[str]) -> list[list[str]]:
        """The overrides of each cell of a trial."""
        if self.seeds is None:
            return [overrides]
        return [[*overrides, f"seed={seed}"] for seed in self.seeds]

    def _mean(self, folders: Sequence[Path]) -> float | None:
        """The mean metric of a trial's cells; None if one of them is not completed or lacks it."""
        values = [(read_numbers(folder) or {}).get(self.metric) for folder in folders]
        numbers = [value for value in values if value is not None]
        return fmean(numbers) if len(numbers) == len(values) else None

    def _write_summary(self, study: Any) -> None:
        """Writes `search.json` into the sweep's folder."""
        assert self.config is not None
        trials = [
            {
                "params": trial.params,
                "cells": trial.user_attrs.get("cells", []),
                "state": trial.state.name.lower(),
                "value": trial.value,
            }
            for trial in study.trials
        ]
        completed = any(trial["value"] is not None for trial in trials)
        summary = {
            "metric": self.metric,
            "direction": self.direction,
            "seeds": None if self.seeds is None else list(self.seeds),
            "best": trials[study.best_trial.number] if completed else None,
            "importance": _importance(study),
            "trials": trials,
        }
        with atomic(Path(self.config.hydra.sweep.dir) / SUMMARY) as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    def _distribution(self, override: Override) -> Any:
        """The distribution of a swept key: an interval, log-uniform with tag(log, ...), or listed values.

        Raises:
            BadInput: the interval is invalid.
        """
        from optuna import distributions

        values = override.value()
        if not isinstance(values, IntervalSweep):
            return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
        assert values.start is not None
        assert values.end is not None
        low, high, log = values.start, values.end, "log" in values.tags
        typed = f"{override.input_line}"
        if not (math.isfinite(low) and math.isfinite(high) and low <= high and (low > 0 or not log)):
            raise BadInput(f"{typed}: an interval needs two numbers, the lower one first; with log, above 0")
        if not self._is_whole(override.key_or_group, low, high):
            return distributions.FloatDistribution(low, high, log=log)
        if low != int(low) or high != int(high):
            raise BadInput(f"{typed}: {override.key_or_group} takes whole numbers")
        return distributions.IntDistribution(int(low), int(high), log=log)

    def _is_whole(self, key: str, low: float, high: float) -> bool:
        """Whether an interval is of integers, according to the schema, int(...) or the key's default.

        Hydra parses the bounds of an interval as floats, except in int(...).
        """
        if key in WHOLE_KEYS or (isinstance(low, int) and isinstance(high, int)):
            return True
        if key in SCHEMA_KEYS or low != int(low) or high != int(high):
            return False
        assert self.config is not None
        default = OmegaConf.select(self.config, key)
        return isinstance(default, int) and not isinstance(default, bool)
