"""The table that `--dry` prints: the state of each cell and its estimated cost."""

import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedlight.config import CellConfig
from fedlight.experiment.estimate import Estimate, describe_fuse, estimate
from fedlight.experiment.footprint import measure_footprint
from fedlight.experiment.parts import CellParts
from fedlight.experiment.result import describe_here
from fedlight.experiment.server_view import describe_server_view
from fedlight.experiment.trial import check
from fedlight.reporting import numbers
from fedlight.runs.beginnings import find_beginning, find_shorter
from fedlight.runs.identity import cell_folder, read_config
from fedlight.runs.reader import flatten
from fedlight.runs.status import DONE, read_cell
from fedlight.runtime.secret import masked

WIDTH = 160  # of the table in a file or a pipe, in characters


def print_plan(cells: Sequence[CellConfig]) -> None:
    """Prints the state and the estimated cost of each cell, and the cost of those that are not done.

    Raises:
        BadInput: a cell cannot be run as configured.
    """
    table = Table("cell", "state", title="the plan; nothing is run", title_justify="left")
    for heading in ("steps", "bytes", "time, about"):
        table.add_column(heading, justify="right")
    tuned = any(config.finetuning for config in cells)
    for heading in ("a round", "trained", "frozen", "memory of a step") if tuned else ():
        table.add_column(heading, justify="right")
    remaining: list[Estimate] = []
    notes: dict[str, None] = {}  # a set that keeps its order
    folders = [cell_folder(config) for config in cells]
    leaves = (flatten(masked(config.plain())) for config in cells)
    planned = find_shorter(dict(zip(folders, leaves, strict=True)))
    for folder, config in zip(folders, cells, strict=True):
        cell = read_cell(folder, None, {})
        state = f"{cell.state}, round {cell.round}" if cell.round and cell.state != DONE else cell.state
        parts = check(config, elsewhere=False)
        assert parts is not None
        notes |= dict.fromkeys(parts.dataset.notes)
        if view := describe_server_view(config):
            notes[f"aggregation=secure: the server sees {view}, and no single update"] = None
        taken = 0
        if cell.state != DONE:
            taken = max([*planned[folder], _rounds_beside(folder, parts)])
            state += f", from round {taken}" if taken else ""
        cost = estimate(parts, taken)
        if cell.state != DONE and (note := describe_fuse(parts)):
            notes[note] = None
        most = "at most " if config.early_stopping else ""
        figures = [f"{most}{figure}" for figure in _formatted(cost)]
        if tuned:
            figures += _needs(parts, cost.bytes / max(1, config.rounds - taken))
        table.add_row(folder.name, state, *figures)
        if cell.state != DONE:
            remaining.append(cost)
    for note in notes:
        print(f"fedlight: {note}", file=sys.stderr)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    summary = f"{len(cells)} cells, {len(cells) - len(remaining)} done"
    if remaining:
        total = Estimate(*(sum(column) for column in zip(*map(astuple, remaining), strict=True)))
        steps, volume, seconds = _formatted(total)
        most = "at most " if any(config.early_stopping for config in cells) else ""
        summary += (
            f"; left: {most}{steps} steps, {volume} exchanged, about {seconds} on this machine, one cell "
            "after the other"
        )
    console.print(summary, soft_wrap=True)


def _needs(parts: CellParts, round_bytes: float) -> list[str]:
    """Mean bytes of a round, parameters that are trained and frozen, peak memory of a training step."""
    needs = measure_footprint(parts)
    memory = numbers.NONE if needs.megabytes is None else numbers.data_volume(1e6 * needs.megabytes)
    return [
        numbers.data_volume(round_bytes),
        numbers.count(needs.trained),
        numbers.count(needs.frozen),
        memory,
    ]


def _rounds_beside(folder: Path, parts: CellParts) -> int:
    """The rounds of the longest completed cell of the sweep that a cell goes on from; 0 without one."""
    here = describe_here(parts.make_trainer().precision)
    shorter = find_beginning(folder, masked(parts.config.plain()), here)
    return 0 if shorter is None else int(read_config(shorter / "config.yaml")["rounds"])


def _formatted(cost: Estimate) -> tuple[str, str, str]:
    return numbers.count(cost.steps), numbers.data_volume(cost.bytes), numbers.seconds(cost.seconds)
