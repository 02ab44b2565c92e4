"""What the command of a sweep's plan, which may come from elsewhere, may hold without --trust."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString
from hydra.errors import HydraException

from fedlight.compose import ROOT
from fedlight.runtime.errors import BadInput

FLAGS = {"-m", "--multirun"}
CHOICES = {"hydra/launcher": {"basic", "local", "slurm"}, "hydra/sweeper": {"planned", "optuna"}}
LAUNCHER = (
    *("account", "array_parallelism", "constraint", "cpus_per_task", "detach", "gpus_per_node"),
    *("max_num_timeout", "mem_gb", "n_jobs", "name", "nodes", "partition", "qos", "signal_delay_s"),
    *("tasks_per_node", "timeout_min"),
)
SWEEPER = ("direction", "dry", "max_batch_size", "metric", "n_jobs", "n_trials", "seed")
SETTINGS = {*(f"hydra.launcher.{key}" for key in LAUNCHER), *(f"hydra.sweeper.{key}" for key in SWEEPER)}
"""Keys of Hydra that may have a value of their own; the others can bring files, code or shell commands."""
WORD = re.compile(r"[\w.,:@%+*&|()=-]*")  # a setting: it stands in the script that sbatch gets, in one line
KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def check_command(command: Sequence[str]) -> None:
    """Checks the command of a plan, before anything of it is composed.

    Allowed are `-m`, choices among the shipped configurations, plain values for keys of a cell, and
    settings of the launcher and the sweeper. What the cells then call is checked when they are composed.

    Args:
        command: what was typed after `python -m fedlight.run`.

    Raises:
        BadInput: the message names what is not allowed.
    """
    if FLAGS.isdisjoint(command):
        raise BadInput("it is no sweep: -m is missing")
    parser = OverridesParser.create()
    for argument in command:
        if argument in FLAGS:
            continue
        if argument.startswith("-"):
            raise BadInput(f"it has the option {argument}")
        if "${" in argument:
            raise BadInput(f"{argument} would be computed")
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            raise BadInput(f"{argument} cannot be understood") from error
        _check_override(override, argument)


def _check_override(override: Override, argument: str) -> None:
    key = override.key_or_group
    choices = _choices(key)
    if override.package is not None:
        raise BadInput(f"{argument} moves a configuration to another place")
    if choices is not None:
        for value in _values(override):
            if value not in choices:
                raise BadInput(f"{argument} chooses what is not among {', '.join(sorted(choices))}")
    elif key in SETTINGS:
        for value in _values(override):
            if not WORD.fullmatch(value):
                raise BadInput(f"{argument} is no single word or number")
    elif key.split(".")[0] == "hydra" or not KEY.fullmatch(key):
        raise BadInput(f"{argument} sets what can run code")


def _values(override: Override) -> Iterator[str]:
    """The values that an override of one key gives to it, as texts; another kind of value is its own text."""
    value: Any = override.value()
    if isinstance(value, Glob) or override.is_delete():
        return
    for item in value.list if isinstance(value, ChoiceSweep) else [value]:
        yield item.text if isinstance(item, QuotedString) else "null" if item is None else str(item)


@cache
def _choices(group: str) -> set[str] | None:
    """The shipped configurations of a group; None for what is no group."""
    if group in CHOICES:
        return CHOICES[group]
    folder = Path(ROOT, group) if group == "sweeps" else Path(ROOT, "configs", group)
    if "/" in group or "." in group or group == "hydra" or not folder.is_dir():
        return None
    return {"null", *(path.stem for path in folder.glob("*.yaml"))}
