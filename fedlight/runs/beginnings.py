"""Cells that differ in their number of rounds alone: the shorter one is the beginning of the longer one."""

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fedlight.runs.identity import cell_id, changes_no_result, is_done, read_config, read_result
from fedlight.runs.reader import flatten
from fedlight.runtime.errors import BadInput

ROUNDS = re.compile(r"-R(\d+)-E")  # in a cell id
PROCESSOR = ("processor", "accelerator", "precision")
"""Of a result's `machine`: what decides the last bits of sums."""

Name = TypeVar("Name")


def explain_dependence(config: Mapping[str, Any]) -> str | None:
    """Why the first rounds of a cell depend on R; None where they do not.

    Args:
        config: of the cell, by dotted keys.
    """
    if (decay := config.get("optimizer.decay")) is not None:
        return f"optimizer.decay={decay} spreads the learning rate over all rounds"
    if (target := config.get("privacy.target_epsilon")) is not None:
        return f"privacy.target_epsilon={target} sets the noise by the number of rounds"
    if config.get("privacy.secure_noise"):
        return "privacy.secure_noise=true draws noise that no other cell has"
    return None


def find_shorter(configs: Mapping[Name, Mapping[str, Any]]) -> dict[Name, list[int]]:
    """The rounds of those cells that each cell can go on from, in ascending order.

    Args:
        configs: name of each cell -> its configuration by dotted keys, without secrets.
    """
    keys = {
        name: json.dumps(_counted(config), sort_keys=True)
        for name, config in configs.items()
        if explain_dependence(config) is None
    }
    alike: dict[str, set[int]] = defaultdict(set)
    for name, key in keys.items():
        alike[key].add(configs[name]["rounds"])
    return {
        name: sorted(n for n in alike[keys[name]] if 0 < n < config["rounds"]) if name in keys else []
        for name, config in configs.items()
    }


def order_by_rounds(configs: Mapping[Name, Mapping[str, Any]]) -> list[list[Name]]:
    """Sorts cells into groups to be run one after the other.

    A cell is in a later group than those that it can go on from; all others are in the first one.

    Args:
        configs: name of each cell -> its configuration by dotted keys, without secrets.
    """
    groups: dict[int, list[Name]] = defaultdict(list)
    for name, shorter in find_shorter(configs).items():
        groups[len(shorter)].append(name)
    return [groups[number] for number in sorted(groups)]


def find_beginning(folder: Path, config: dict[str, Any], result: Mapping[str, Any]) -> Path | None:
    """The longest completed cell beside a cell's folder that is its beginning, bit by bit; None without one.

    Args:
        folder: of the cell.
        config: of the cell, nested, without secrets.
        result: of the cell, with the versions of its libraries and its machine.
    """
    leaves = flatten(config)
    if explain_dependence(leaves) is not None:
        return None
    for rounds in sorted(_rounds_beside(folder), reverse=True):
        shorter = folder.with_name(cell_id({**config, "rounds": rounds}))
        if 0 < rounds < config["rounds"] and is_done(shorter):
            try:
                difference = explain_difference(shorter, leaves) or explain_other_sums(
                    shorter, leaves, result
                )
            except BadInput as error:
                difference = str(error)
            if difference is None:
                return shorter
            print(f"fedlight: {folder.name}: {shorter.name} does not start it: {difference}", file=sys.stderr)
    return None


def explain_difference(shorter: Path, config: Mapping[str, Any]) -> str | None:
    """What two cells differ in beside their rounds; None where that is nothing.

    Args:
        shorter: folder of one cell.
        config: of the other one, by dotted keys, without secrets.

    Raises:
        BadInput: the configuration in the folder cannot be read.
    """
    ours, theirs = (_counted(leaves) for leaves in (config, _read_leaves(shorter)))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            return f"{key} is {theirs.get(key)} there and {ours.get(key)} here"
    return None


def explain_other_sums(shorter: Path, config: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
    """Why the last bits of sums may differ between a completed cell and another one; None if they do not.

    Args:
        shorter: folder of the completed cell.
        config: of the other one, by dotted keys.
        result: of the other one, with the versions of its libraries and its machine.
    """
    stored = read_result(shorter) or {}
    cores = () if config.get("trainer.threads") else ("cores",)  # without a number, all of them sum
    for entry, keys in (("versions", tuple(result["versions"])), ("machine", (*PROCESSOR, *cores))):
        there = stored.get(entry)
        for key in keys:
            theirs = there.get(key) if isinstance(there, dict) else None
            if theirs != (ours := result[entry].get(key)):
                return f"it was trained with {key} {theirs}, and here it is {ours}"
    return None


def _read_leaves(cell: Path) -> dict[str, Any]:
    """The configuration of a cell by dotted keys."""
    return flatten(read_config(cell / "config.yaml"))


def _counted(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that cells with the same first rounds have in common."""
    return {key: value for key, value in config.items() if not changes_no_result(key) and key != "rounds"}


def _rounds_beside(folder: Path) -> set[int]:
    """The numbers of rounds of the cells beside a cell's folder, from their ids."""
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir(folder.parent)
    return {int(match[1]) for name in names if (match := ROUNDS.search(name))}
