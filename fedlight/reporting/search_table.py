"""The tables of a search: its best trials, and the importance of each key, from `search.json` of a sweep."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from fedlight.reporting.tables import Field, ReportTable, number
from fedlight.runs.reader import Number

SUMMARY = "search.json"
LISTED = 10  # trials in the table
LARGEST = 2**24  # bytes of the file; a trial has about 2**9


class StoredTrial(BaseModel):
    """One trial: the values that it drew, its cells, and the mean of their metric."""

    params: dict[str, str | float]
    cells: list[str]
    value: Number | None


class StoredSearch(BaseModel):
    """The part of `search.json` that the report uses; the file is untrusted."""

    metric: str
    direction: str
    importance: dict[str, Number]
    trials: list[StoredTrial]


SEARCH = TypeAdapter(StoredSearch)


def search_tables(sweeps: list[Path]) -> list[ReportTable]:
    """The tables of the searches among these sweeps; none where `search.json` is missing or damaged."""
    tables = []
    for position, sweep in enumerate(sweeps):
        search = _read(sweep / SUMMARY)
        if search is not None:
            prefix = f"search{position or ''}"
            tables += [_trials(search, f"{prefix}_trials"), _importance(search, f"{prefix}_importance")]
    return [table for table in tables if table.rows]


def _read(path: Path) -> StoredSearch | None:
    try:
        with path.open("rb") as file:
            return SEARCH.validate_python(json.loads(file.read(LARGEST)))
    except (OSError, ValidationError, ValueError, RecursionError):
        return None


def _trials(search: StoredSearch, name: str) -> ReportTable:
    completed = [trial for trial in search.trials if trial.value is not None]
    ordered = sorted(completed, key=lambda trial: trial.value or 0.0, reverse=search.direction == "maximize")
    keys = list(dict.fromkeys(key for trial in ordered for key in trial.params))
    rows, data = [], []
    for rank, trial in enumerate(ordered[:LISTED], 1):
        drawn = [trial.params.get(key) for key in keys]
        cells = ", ".join(trial.cells)
        rows.append(
            [
                Field(str(rank), rank),
                *(Field("" if value is None else _plain(value), value) for value in drawn),
                number(trial.value, _plain),
                Field(cells, cells),
            ]
        )
        data.append({"rank": rank, **trial.params, search.metric: trial.value, "cells": cells})
    return ReportTable(
        name,
        "Search: the best trials",
        f"Of {len(search.trials)} trials, {len(completed)} completed. The search was to {search.direction} "
        f"{search.metric}, the mean over the cells of a trial.",
        ["rank", *keys, search.metric, "cells"],
        {"rank", search.metric},
        rows,
        data,
    )


def _importance(search: StoredSearch, name: str) -> ReportTable:
    shares: list[tuple[str, Any]] = sorted(search.importance.items(), key=lambda item: -item[1])
    return ReportTable(
        name,
        "Search: the importance of each key",
        f"Share of the variance of {search.metric} over the trials that the key explains (fANOVA).",
        ["key", "importance"],
        {"importance"},
        [[Field(key, key), number(share, lambda value: f"{value:.0%}")] for key, share in shares],
        [{"key": key, "importance": share} for key, share in shares],
    )


def _plain(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
