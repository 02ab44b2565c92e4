"""The study of a search, which outlives its process: Optuna's journal in the folder of the sweep.

Hydra imports every module of this package but those with an underscore; Optuna is loaded for a search alone.
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from fedlight.runtime.errors import BadInput

STUDY = ".search"  # in the sweep's folder; a process that searches has the lease of it
JOURNAL = "journal.log"
LARGEST = 2**28  # bytes of a journal; a trial has about 2**10

Space = Mapping[str, BaseDistribution]


class LeasedFile:
    """No lock, as the process has the lease of the folder; Optuna's own locks outlive a killed process."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def name_study(settings: Mapping[str, Any], space: Space) -> str:
    """The name of a study: a hash of all that decides which trials are drawn and what they are worth.

    Args:
        settings: what the trials share.
        space: key -> the distribution of its values.
    """
    drawn = {key: distribution_to_json(distribution) for key, distribution in space.items()}
    content = json.dumps([settings, drawn], sort_keys=True, default=str)
    return blake2b(content.encode(), digest_size=4).hexdigest()


def open_study(path: Path, name: str, space: Space, direction: str, prunes: bool) -> optuna.Study:
    """Opens a study, or begins it; the file may come from anybody, and is parsed as JSON.

    Args:
        path: of the journal, in a folder of which this process has the lease.
        name: of the study; a journal may hold several.
        space: key -> the distribution of its values.
        direction: minimize or maximize.
        prunes: whether trials that are worse than the median of the others are ended.

    Raises:
        BadInput: the file is damaged, or a trial in it has other keys or values than the search.
    """
    try:
        if path.exists() and path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        _cut_torn_line(path)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path), LeasedFile())),
            pruner=optuna.pruners.MedianPruner() if prunes else optuna.pruners.NopPruner(),
            study_name=name,
            direction=direction,
            load_if_exists=True,
        )
        for trial in study.trials:
            _check_trial(trial, space)
    except OSError as error:
        raise BadInput(f"{path} cannot be used: {error.strerror}") from error
    except Exception as error:  # Optuna replays what it parsed, and raises whatever that leads to
        message = f"{path} is damaged ({type(error).__name__}: {error})"
        raise BadInput(
            f"{message}; remove it to begin the search again, which trains no completed cell twice"
        ) from error
    return study


def draw_trial(study: optuna.Study, space: Space, seed: int) -> FrozenTrial:
    """Draws the next trial and writes it into the journal, in one line.

    Its values depend on the seed, its number and the trials that have ended, and on nothing else.

    Args:
        study: of the search.
        space: key -> the distribution of its values.
        seed: of the search.
    """
    trials = study.get_trials(deepcopy=False)
    (own_seed,) = np.random.SeedSequence([seed, len(trials)]).generate_state(1)
    sampler = optuna.samplers.TPESampler(seed=int(own_seed))
    ended = optuna.create_study(direction=study.direction, sampler=sampler)
    ended.add_trials(trial for trial in trials if trial.state.is_finished())
    drawn = ended.ask(dict(space)).params
    study.add_trial(create_trial(state=TrialState.RUNNING, params=drawn, distributions=dict(space)))
    return study.get_trials(deepcopy=False)[-1]


def reopen_trial(study: optuna.Study, number: int) -> optuna.Trial:
    """A trial of the journal that has not ended, to be reported to."""
    return optuna.Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)


def _cut_torn_line(path: Path) -> None:
    """Cuts off the last line where a killed process has written a part of it.

    Raises:
        ValueError: another line is no JSON.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].splitlines():
            json.loads(line)
        if whole < len(content):
            file.truncate(whole)


def _check_trial(trial: FrozenTrial, space: Space) -> None:
    """Raises ValueError where a trial could not have been drawn from the space."""
    if trial.distributions != dict(space) or trial.params.keys() != space.keys():
        raise ValueError(f"trial {trial.number} has other keys")
    for key, value in trial.params.items():
        distribution = space[key]
        valid = (
            value in distribution.choices
            if isinstance(distribution, CategoricalDistribution)
            else distribution._contains(value)
        )
        if not valid:
            raise ValueError(f"trial {trial.number} has {key}={value}")
