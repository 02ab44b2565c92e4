"""A search for the cell with the best result by Optuna, instead of a grid."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlight.loggers.wandb_mode import runs_of_a_grid
from fedlight.overrides import keep_text
from fedlight.runs.beginnings import explain_dependence
from fedlight.runs.identity import cell_id
from fedlight.runs.reader import Result, flatten, read_numbers
from fedlight.runtime.errors import BadInput, CellFailed, LeaseTaken
from fedlight.runtime.files import atomic
from fedlight.runtime.lease import Lease, acquire_lease, read_file_clock, read_holder
from fedlight.runtime.process_record import is_alive
from hydra_plugins.fedlight_sweeps.pool import CellPool, open_pool
from hydra_plugins.fedlight_sweeps.sweeper import Cells, PlanningSweeper

DIRECTIONS = ("minimize", "maximize")
SUMMARY = "search.json"  # in the sweep's folder
POLL = 5.0  # seconds between two looks at cells that another process works on


@dataclass
class OpenTrial:
    """A trial that this command works on.

    Attributes:
        number: in the study, from 0.
        drawn: the overrides that it has drawn.
        look: index of the number of rounds after which it is looked at next.
        waiting: folders of the cells of this look that have not ended.
    """

    number: int
    drawn: list[str]
    look: int
    waiting: set[Path] = field(default_factory=set)


@dataclass
class Search:
    """A search while it runs.

    Attributes:
        space: key -> the distribution of its values.
        fixed: overrides that all trials share.
        looks: the number of rounds at each look at a trial, the last of which is at the end.
        study: of Optuna, in the journal.
        cells: of all trials so far.
        groups: number of each trial -> the folders of the cells of its latest look.
        trials: those under way.
        queue: cells that are to be started: folder -> overrides.
        running: the folders of the cells in the pool.
        ended: the folders of the cells that have ended in this command, completed or not.
        started: number of cells that were started in this command.
        failed: numbers of the trials that failed in this command; the study has them as not ended.
        refused: the drawn values that cannot be run -> why.
    """

    space: dict[str, Any]
    fixed: list[str]
    looks: list[int | None]
    study: Any = None
    cells: Cells = field(default_factory=dict)
    groups: dict[int, list[Path]] = field(default_factory=dict)
    trials: list[OpenTrial] = field(default_factory=list)
    queue: dict[Path, list[str]] = field(default_factory=dict)
    running: set[Path] = field(default_factory=set)
    ended: set[Path] = field(default_factory=set)
    started: int = 0
    failed: set[int] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)

    def refuse(self, drawn: Sequence[str], reason: str) -> None:
        """Notes why a trial cannot be run, and prints it once."""
        name = " ".join(drawn)
        if self.refused.setdefault(name, reason) is reason:
            print(f"fedlight: [{name}] fails, as it cannot be run: {reason}", file=sys.stderr)


def _drawn(trial: Any) -> list[str]:
    """The overrides that a trial has drawn."""
    return [f"{key}={value}" for key, value in trial.params.items()]


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _is_held(folder: Path) -> bool:
    """Whether another process works on a cell, such as a job of this search from before it was killed."""
    holder = read_holder(folder)
    return holder is not None and is_alive(holder[0], read_file_clock(folder.parent) - holder[1])


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
    """Runs cells that are drawn one after the other, each from the results that there are by then.

    A trial is drawn as soon as a place is free. Optuna's study is in `.search/` in the sweep's folder:
    the same command goes on with the trials that have not ended, then draws further ones. After each trial
    `search.json` has the trials, the best one, and the importance of each key.

    Args:
        params: of the search: key: values, as on the command line, whose values take precedence.
        dry: rejected, since the cells depend on results.
        n_trials: number of trials, those of earlier commands included.
        n_jobs: maximum number of trials at once; the launcher may run fewer cells at once.
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
            LeaseTaken: another process works on the search.
        """
        if self.dry:
            raise BadInput("--dry: which cells a search runs follows from their results")
        try:
            import optuna
        except ImportError as error:
            raise BadInput("hydra/sweeper=optuna: pip install 'fedlight[optuna]'") from error
        self._check_settings()
        from hydra_plugins.fedlight_sweeps._space import read_space
        from hydra_plugins.fedlight_sweeps._study import JOURNAL, STUDY

        assert self.config is not None
        overrides = self.parse(arguments)
        fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
        space = read_space(overrides, self.config)
        if self.seeds is not None and "seed" in space:
            raise BadInput("hydra.sweeper.seeds sets the seeds of every trial, so seed cannot be searched")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        looks = self._looks(overrides)
        folder = Path(self.config.hydra.sweep.dir, STUDY)
        search = Search(space, fixed, looks)
        try:
            with acquire_lease(folder) as lease:
                self._search(search, folder / JOURNAL, lease)
        except LeaseTaken as error:
            reason = str(error).removeprefix(f"{STUDY}: ")
            raise LeaseTaken(f"{self.config.name}: the search is {reason}") from None
        self._conclude(search)

    def _search(self, search: Search, journal: Path, lease: Lease) -> None:
        """Runs the trials of a search in the folder of which this process has the lease."""
        from hydra_plugins.fedlight_sweeps._study import name_study, open_study

        assert self.launcher is not None
        is_new = not journal.exists()
        name = name_study(self._describe(search), search.space)
        prunes = len(search.looks) > 1
        search.study = open_study(journal, name, search.space, self.direction, prunes)
        most = self.n_jobs * len(self.seeds or [0])
        try:
            with closing(open_pool(self.launcher, most)) as pool, runs_of_a_grid():
                self._resume(search)
                while self._start_cells(search, pool):
                    ended = pool.wait()
                    lease.check()
                    for overrides in ended:
                        self._end_cell(search, self.places[tuple(overrides)])
        finally:
            if is_new and not search.cells:
                journal.unlink(missing_ok=True)

    def _describe(self, search: Search) -> dict[str, Any]:
        """What decides the values and the results of all trials, beside the space."""
        first = {
            key: values.choices[0] if hasattr(values, "choices") else values.low
            for key, values in search.space.items()
        }
        (cell, *_) = self._cells_of(
            [f"{key}={value}" for key, value in first.items()], search.fixed, search.looks[-1]
        )
        try:
            shared: Any = cell_id(self.compose(cell).plain())
        except (BadInput, HydraException, OmegaConfBaseException):  # this one cannot be run; others may
            shared = search.fixed
        settings = {"metric": self.metric, "seed": self.seed, "seeds": self.seeds, "looks": search.looks}
        return {"cell": shared, **settings}

    def _resume(self, search: Search) -> None:
        """Takes up the trials of earlier commands: those that have ended are read, the others go on."""
        for trial in search.study.trials:
            reached = [search.looks.index(step) for step in trial.intermediate_values if step in search.looks]
            if trial.state.is_finished():
                last = len(search.looks) - 1 if trial.state.name == "COMPLETE" else max(reached, default=0)
                for look in range(last + 1):
                    group = self._cells_of(_drawn(trial), search.fixed, search.looks[look])
                    cells, _ = self.examine(group)
                    search.cells |= cells
                    search.groups[trial.number] = list(cells)
            else:
                search.trials.append(OpenTrial(trial.number, _drawn(trial), max(reached, default=0)))
        self._begin_looks(search, list(search.trials))

    def _start_cells(self, search: Search, pool: CellPool) -> bool:
        """Starts cells, of new trials too, while places are free; returns whether any is under way."""
        while True:
            batch: list[list[str]] = []
            while len(search.running) < pool.size:
                folder = next((folder for folder in search.queue if not _is_held(folder)), None)
                if folder is not None:
                    batch.append(search.queue.pop(folder))
                    search.running.add(folder)
                elif not search.queue and len(search.trials) < self.n_jobs and self._is_left(search):
                    self._draw(search)
                else:
                    break
            if batch:
                pool.start(batch, search.started)
                search.started += len(batch)
            if search.running or not search.queue:
                return bool(search.running)
            time.sleep(POLL)  # another process works on all that is left

    def _is_left(self, search: Search) -> bool:
        return len(search.study.get_trials(deepcopy=False)) < self.n_trials

    def _draw(self, search: Search) -> None:
        """Draws a trial and puts its cells into the queue."""
        from hydra_plugins.fedlight_sweeps._study import draw_trial

        drawn = draw_trial(search.study, search.space, self.seed)
        trial = OpenTrial(drawn.number, _drawn(drawn), 0)
        search.trials.append(trial)
        self._begin_looks(search, [trial])

    def _begin_looks(self, search: Search, trials: Sequence[OpenTrial]) -> None:
        """Puts the cells of trials up to their next look into the queue; ends a trial where that fails.

        Raises:
            BadInput: a cell cannot go on to more rounds.
        """
        groups: list[tuple[OpenTrial, Cells]] = []
        for trial in trials:
            cells, bad = self.examine(self._cells_of(trial.drawn, search.fixed, search.looks[trial.look]))
            if self.prune_every is not None:
                _check_prefixes(cells)
            if bad:
                search.refuse(trial.drawn, bad[0][1])
                self._fail(search, trial)
            else:
                groups.append((trial, cells))
        new = {folder: cell for _, cells in groups for folder, cell in cells.items()}
        new = {folder: cell for folder, cell in new.items() if folder not in search.cells}
        if new:
            self.plan(
                new, search.cells
            )  # of all trials at once: it keeps the SLURM jobs of these cells alone
        search.cells |= new
        for trial, cells in groups:
            search.groups[trial.number] = list(cells)
            trial.waiting = {folder for folder, cell in cells.items() if not cell.done} - search.ended
            for folder in cells:
                if folder in trial.waiting - search.running:
                    search.queue.setdefault(folder, search.cells[folder].overrides)
            if not trial.waiting:
                self._look_at(search, trial)

    def _end_cell(self, search: Search, folder: Path) -> None:
        """Notes that a cell has ended, and goes on with the trials that have waited for it alone."""
        search.running.discard(folder)
        search.ended.add(folder)
        for trial in [trial for trial in search.trials if folder in trial.waiting]:
            trial.waiting.discard(folder)
            if not trial.waiting:
                self._look_at(search, trial)

    def _look_at(self, search: Search, trial: OpenTrial) -> None:
        """Reads the results of a trial's cells: the trial ends, or goes on to its next look.

        Raises:
            BadInput: cells are completed and none has the metric.
        """
        from hydra_plugins.fedlight_sweeps._study import reopen_trial

        self._check_metric(search.cells)
        value, rounds = self._mean(search.groups[trial.number]), search.looks[trial.look]
        if value is None:
            self._fail(search, trial)
            return
        if trial.look == len(search.looks) - 1:
            self._end_trial(search, trial, "COMPLETE", value)
            return
        reported = reopen_trial(search.study, trial.number)
        if rounds not in search.study.trials[trial.number].intermediate_values:
            reported.report(value, rounds)
        if reported.should_prune():
            self._end_trial(search, trial, "PRUNED", None)
            return
        trial.look += 1
        self._begin_looks(search, [trial])

    def _end_trial(self, search: Search, trial: OpenTrial, state: str, value: float | None) -> None:
        search.study.tell(trial.number, value, state=_state(state))
        search.trials.remove(trial)
        self._write_summary(search)

    def _fail(self, search: Search, trial: OpenTrial) -> None:
        """Gives a trial up; the study keeps it open, so that the next command tries again."""
        search.failed.add(trial.number)
        search.trials.remove(trial)
        if search.cells:
            self._write_summary(search)

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
        self._write_summary(search)
        if _completed(study):
            best = " ".join(f"{key}={value}" for key, value in study.best_params.items())
            print(f"best of {len(study.trials)}: {self.metric} {study.best_value:.4g} with {best}")
            if importance := _importance(study):
                print("importance: " + ", ".join(f"{key} {share:.0%}" for key, share in importance.items()))
        if search.failed:
            raise CellFailed(1)

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
        if not isinstance(self.metric, str) or not self.metric:
            raise BadInput(
                "hydra.sweeper.metric must be the dotted key of a number in result.json, such as fid.value, "
                f"got {self.metric!r}"
            )
        first = self.metric.split(".")[0]
        close = get_close_matches(first, Result.model_fields, n=1)
        if close and first != close[0]:
            raise BadInput(f"hydra.sweeper.metric={self.metric}: did you mean {close[0]}?")
        if OmegaConf.select(self.config, "hydra.launcher.detach"):
            raise BadInput("hydra.launcher.detach=true: a search waits for its cells; leave it false")
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

    def _cells_of(self, drawn: Sequence[str], fixed: Sequence[str], look: int | None) -> list[list[str]]:
        """The overrides of each cell of a trial."""
        rounds = [] if look is None else [f"rounds={look}"]
        overrides = [*keep_text([*fixed, *drawn]), *rounds]
        return [overrides] if self.seeds is None else [[*overrides, f"seed={seed}"] for seed in self.seeds]

    def _mean(self, folders: Sequence[Path]) -> float | None:
        """The mean metric of a trial's cells; None if one of them is not completed or lacks it."""
        values = [(read_numbers(folder) or {}).get(self.metric) for folder in folders]
        numbers = [value for value in values if value is not None]
        return fmean(numbers) if len(numbers) == len(values) else None

    def _write_summary(self, search: Search) -> None:
        """Writes `search.json` into the sweep's folder."""
        assert self.config is not None
        study = search.study
        trials = [
            {
                "params": trial.params,
                "cells": [folder.name for folder in search.groups.get(trial.number, [])],
                "state": "fail" if trial.number in search.failed else trial.state.name.lower(),
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
