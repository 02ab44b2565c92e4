"""A search for the cell with the best result by Optuna, instead of a grid."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf

from fedlight.config import SCHEMA_KEYS, WHOLE_KEYS
from fedlight.loggers.wandb_mode import runs_of_a_grid
from fedlight.overrides import keep_text
from fedlight.runs.beginnings import explain_dependence
from fedlight.runs.reader import Result, flatten, read_numbers
from fedlight.runtime.errors import BadInput, CellFailed
from fedlight.runtime.files import atomic
from hydra_plugins.fedlight_sweeps.sweeper import Cells, PlanningSweeper

DIRECTIONS = ("minimize", "maximize")
SUMMARY = "search.json"  # in the sweep's folder


@dataclass
class Search:
    """A search while it runs.

    Attributes:
        study: of Optuna.
        cells: of all trials so far.
        refused: the drawn values that cannot be run -> why.
        failed: the last error of a cell.
    """

    study: Any
    cells: Cells = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: CellFailed | None = None

    def refuse(self, trial: Any, reason: str) -> None:
        """Notes why a trial cannot be run, and prints it once."""
        name = " ".join(_drawn(trial))
        if self.refused.setdefault(name, reason) is reason:
            print(f"fedlight: [{name}] fails, as it cannot be run: {reason}", file=sys.stderr)


def _drawn(trial: Any) -> list[str]:
    """The overrides that a trial has drawn."""
    return [f"{key}={value}" for key, value in trial.params.items()]


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _check_prefixes(cells: Cells) -> None:
    """Raises BadInput where a cell cannot go on to more rounds, which would be trained twice."""
    for cell in cells.values():
        if reason := explain_dependence(flatten(cell.config.plain())):
            raise BadInput(f"hydra.sweeper.prune_every needs cells that can go on: {reason}")


def _completed(study: Any) -> bool:
    return any(trial.state.name == "COMPLETE" for trial in study.trials)


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
        prune_every: number of rounds between two looks at a trial, which ends where its metric is worse than
            the median of the others after as many rounds; None for no such look.
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
        prune_every: int | None = None,
    ) -> None:
        super().__init__(None, params, dry)
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.metric = metric
        self.direction = direction
        self.seed = seed
        self.seeds = seeds
        self.prune_every = prune_every

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
        looks = self._looks(overrides)
        search = Search(
            optuna.create_study(
                direction=self.direction,
                sampler=optuna.samplers.TPESampler(seed=self.seed),
                pruner=optuna.pruners.MedianPruner() if looks[1:] else optuna.pruners.NopPruner(),
            )
        )
        while (left := self.n_trials - len(search.study.trials)) > 0:
            trials = [search.study.ask(space) for _ in range(min(left, self.n_jobs))]
            for look in looks:
                trials = self._run_trials(search, trials, fixed, look, is_last=look == looks[-1])
        self._conclude(search)

    def _run_trials(
        self, search: Search, trials: list[Any], fixed: list[str], look: int | None, is_last: bool
    ) -> list[Any]:
        """Runs the cells of trials up to a look at them; returns the trials that go on.

        Args:
            search: so far; the trials that end are reported to its study.
            trials: of one batch.
            fixed: overrides that all trials share.
            look: number of rounds; None for the configured one.
            is_last: whether all trials end here.
        """
        groups = [self._cells_of(trial, fixed, look) for trial in trials]
        reasons = self._run(search, [cell for group in groups for cell in group])
        going_on = []
        for trial, group in zip(trials, groups, strict=True):
            reason = next((reasons[tuple(cell)] for cell in group if tuple(cell) in reasons), None)
            if reason is not None:
                search.refuse(trial, reason)
            value = self._mean(trial, group) if reason is None else None
            if value is None:
                search.study.tell(trial, state=_state("FAIL"))
            elif is_last:
                search.study.tell(trial, value)
            else:
                trial.report(value, look)
                if trial.should_prune():
                    search.study.tell(trial, state=_state("PRUNED"))
                else:
                    going_on.append(trial)
        if search.cells:
            self._write_summary(search.study)
        return going_on

    def _run(self, search: Search, grid: list[list[str]]) -> dict[tuple[str, ...], str]:
        """Runs the cells that are new; returns why those that are invalid cannot be run.

        Raises:
            BadInput: cells are completed and none has the metric, or a cell cannot go on to more rounds.
        """
        valid, bad = self.examine(grid)
        if self.prune_every is not None:
            _check_prefixes(valid)
        new = {folder: cell for folder, cell in valid.items() if folder not in search.cells}
        pending = self.plan(new, search.cells) if new else []
        search.cells |= new
        try:
            if pending:
                with runs_of_a_grid():
                    self.launch_in_order(search.cells, pending, len(search.cells) - len(new))
        except CellFailed as error:
            search.failed = error
        self._check_metric(search.cells)
        return {tuple(cell): reason for cell, reason in bad}

    def _conclude(self, search: Search) -> None:
        """Prints the best trial and the importance of the keys.

        Raises:
            BadInput: no trial can be run.
            CellFailed: some cells failed or are invalid.
        """
        study = search.study
        if not search.cells:
            named = "; ".join(f"[{name}] {reason}" for name, reason in search.refused.items())
            raise BadInput(f"none of the {self.n_trials} cells of the search can be run: {named}")
        if _completed(study):
            best = " ".join(f"{key}={value}" for key, value in study.best_params.items())
            print(f"best of {len(study.trials)}: {self.metric} {study.best_value:.4g} with {best}")
            if importance := _importance(study):
                print("importance: " + ", ".join(f"{key} {share:.0%}" for key, share in importance.items()))
        if search.failed or search.refused:
            raise search.failed or CellFailed(1)

    def _check_settings(self) -> None:
        assert self.config is not None
        for key in ("n_trials", "n_jobs", "prune_every"):
            number = getattr(self, key)
            if key == "prune_every" and number is None:
                continue
            if type(number) is not int or number < 1:
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

    def _looks(self, overrides: Sequence[Override]) -> list[int | None]:
        """The number of rounds at each look at a trial, the last of which is at the end.

        Raises:
            BadInput: the number of rounds is searched for.
        """
        if self.prune_every is None:
            return [None]
        assert self.config is not None
        rounds: Any = OmegaConf.select(self.config, "rounds")
        for override in overrides:
            if override.get_key_element() == "rounds":
                if override.is_sweep_override():
                    raise BadInput(
                        "hydra.sweeper.prune_every compares trials by rounds, which need one value"
                    )
                rounds = override.value()
        return [*range(self.prune_every, rounds, self.prune_every), rounds]

    def _cells_of(self, trial: Any, fixed: list[str], look: int | None) -> list[list[str]]:
        """The overrides of each cell of a trial."""
        rounds = [] if look is None else [f"rounds={look}"]
        overrides = [*keep_text([*fixed, *_drawn(trial)]), *rounds]
        return [overrides] if self.seeds is None else [[*overrides, f"seed={seed}"] for seed in self.seeds]

    def _mean(self, trial: Any, group: list[list[str]]) -> float | None:
        """The mean metric of a trial's cells; None if one of them is not completed or lacks it."""
        folders = [self.places[tuple(cell)] for cell in group]
        trial.set_user_attr("cells", [folder.name for folder in folders])
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
                "value": trial.value if trial.state.name == "COMPLETE" else None,
            }
            for trial in study.trials
        ]
        summary = {
            "metric": self.metric,
            "direction": self.direction,
            "seeds": None if self.seeds is None else list(self.seeds),
            "best": trials[study.best_trial.number] if _completed(study) else None,
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
