"""The check of the command in an untrusted plan of a sweep: what it may contain without --trust."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString
from hydra.errors import HydraException

from fedlight.compose import ROOT
from fedlight.experiment.targets import LOGGER
from fedlight.runtime.errors import BadInput

FLAGS = {"-m", "--multirun"}
CHOICES = {"hydra/launcher": {"basic", "local", "slurm"}, "hydra/sweeper": {"planned", "optuna"}}
LAUNCHER = (
    *("account", "array_parallelism", "constraint", "cpus_per_task", "detach", "gpus_per_node"),
    *("max_num_timeout", "mem_gb", "n_jobs", "name", "nodes", "partition", "qos", "signal_delay_s"),
    *("tasks_per_node", "timeout_min"),
)
SWEEPER = ("direction", "dry", "max_batch_size", "metric", "n_jobs", "n_trials", "prune_every", "seed")
SETTINGS = {*(f"hydra.launcher.{key}" for key in LAUNCHER), *(f"hydra.sweeper.{key}" for key in SWEEPER)}
"""Hydra's keys that may be set; the others can name files, code or shell commands."""
SEEDS = "hydra.sweeper.seeds"
WORD = re.compile(r"[\w.,:@%+*&|()=-]*")  # a value of SETTINGS: it is written into the script for sbatch
KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def check_command(command: Sequence[str]) -> None:
    """Checks the command of a plan before any of it is composed.

    Permitted are `-m`, choices among the shipped configurations, plain values for keys of a cell, and
    settings of the launcher and the sweeper. What the cells would call is checked when they are composed.

    Args:
        command: the arguments of `python -m fedlight.run`.

    Raises:
        BadInput: the command contains something that is not permitted, which the message names.
    """
    if FLAGS.isdisjoint(command):
        raise BadInput("-m is missing, so it does not run a sweep")
    parser = OverridesParser.create()
    for argument in command:
        if argument in FLAGS:
            continue
        if argument.startswith("-"):
            raise BadInput(f"the option {argument} is not permitted: only {', '.join(sorted(FLAGS))} are")
        if "${" in argument:
            raise BadInput(f"{argument} contains an interpolation")
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            raise BadInput(f"{argument} is not a valid override of Hydra") from error
        _check_override(override, argument)


def _check_override(override: Override, argument: str) -> None:
    key = override.key_or_group
    choices = _choices(key)
    if override.package is not None and not (key == "logger" and LOGGER.fullmatch(override.package)):
        raise BadInput(f"{argument} moves a configuration to another package")
    if choices is not None:
        for value in _values(override):
            if value not in choices:
                raise BadInput(f"{argument} chooses {value}; permitted are {', '.join(sorted(choices))}")
    elif key == SEEDS:
        seeds: Any = override.value()
        if not all(type(seed) is int for seed in (seeds if isinstance(seeds, list) else [seeds])):
            raise BadInput(f"{argument} must be a list of whole numbers")
    elif key in SETTINGS:
        for value in _values(override):
            if not WORD.fullmatch(value):
                raise BadInput(f"{argument} must have a value of one word or number")
    elif key.split(".")[0] == "hydra" or not KEY.fullmatch(key):
        raise BadInput(f"{argument} sets a key that can run code")


def _values(override: Override) -> Iterator[str]:
    """The values that an override gives to its key, as texts; none where it deletes the key or is a glob."""
    value: Any = override.value()
    if isinstance(value, Glob) or override.is_delete():
        return
    for item in value.list if isinstance(value, ChoiceSweep) else [value]:
        yield item.text if isinstance(item, QuotedString) else "null" if item is None else str(item)


@cache
def _choices(group: str) -> set[str] | None:
    """The shipped configurations of a group; None where `group` is not a group."""
    if group in CHOICES:
        return CHOICES[group]
    folder = Path(ROOT, group) if group == "sweeps" else Path(ROOT, "configs", group)
    if "/" in group or "." in group or group == "hydra" or not folder.is_dir():
        return None
    return {"null", *(path.stem for path in folder.glob("*.yaml"))}
