"""The cells of a sweep as tables of pandas: a row for each cell, or for each round."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from fedlight.reporting.setting_keys import varying_keys
from fedlight.reporting.summaries import COSTS, SCORES, head
from fedlight.runs.csv_files import EXCHANGE_COLUMNS, ROUND_COLUMNS
from fedlight.runs.reader import Result
from fedlight.runs.status import SweepCell

SETTINGS = (
    *("method.name", "clients", "partition.name", "data.name", "model.name"),
    *("rounds", "epochs", "fraction", "seed"),
)
"""Keys of the configuration that are columns of every table."""


def cells_frame(cells: Sequence[SweepCell]) -> pd.DataFrame:
    """A row for each cell: its settings, its scores, what it exchanged, and its time."""
    results = [cell.files.result for cell in cells]
    scores = [q.key for q in SCORES if any(result and q.read(result) is not None for result in results)]
    every = _settings(cells)
    rows = []
    for cell, settings in zip(cells, every, strict=True):
        result = cell.files.result
        numbers = {**read_scores(result), **read_costs(result)} if result else {}
        rows.append({**settings, **numbers, "note": cell.note, "folder": str(cell.files.folder)})
    named = dict.fromkeys(key for settings in every for key in settings)
    columns = [*named, "fid", "fid_std", *scores, *(q.key for q in COSTS), "note", "folder"]
    return pd.DataFrame(rows, columns=columns)


def rounds_frame(cells: Sequence[SweepCell]) -> pd.DataFrame:
    """A row for each finished round of each cell: the cell's settings and the row of its `rounds.csv`."""
    settings = _settings(cells)
    named = [key for key in dict.fromkeys(key for row in settings for key in row) if key != "rounds"]
    rows = [
        {key: row[key] for key in named} | entry
        for cell, row in zip(cells, settings, strict=True)
        for entry in cell.files.rounds
    ]
    frame = pd.DataFrame(rows, columns=[*named, *ROUND_COLUMNS])
    counts = ("round", *EXCHANGE_COLUMNS)
    return frame.astype({key: "Int64" if key in counts else float for key in ROUND_COLUMNS})


def read_scores(result: Result) -> dict[str, float]:
    """The scores of a cell by column: `fid`, `fid_std` and those of SCORES that it has."""
    values = {"fid": result.quality("value"), "fid_std": result.quality("std")}
    values |= {quantity.key: quantity.read(result) for quantity in SCORES}
    return {key: value for key, value in values.items() if value is not None}


def read_costs(result: Result) -> dict[str, float | None]:
    """What a cell exchanged, its loss and its seconds, by column."""
    return {quantity.key: quantity.read(result) for quantity in COSTS}


def _settings(cells: Sequence[SweepCell]) -> list[dict[str, Any]]:
    """For each cell its name, its state, and the settings that tell it from the other cells."""
    keys = [*SETTINGS, *varying_keys(cells, SETTINGS)]
    return [
        {"sweep": cell.sweep, "cell": cell.cell, "status": cell.state}
        | {head(key): cell.files.config.get(key) for key in keys}
        for cell in cells
    ]
