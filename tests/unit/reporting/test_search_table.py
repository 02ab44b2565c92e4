"""The tables of a search on the page, from a file that may be damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedlight.reporting.search_table import search_tables


def write(sweep: Path, **changes: Any) -> Path:
    drawn = [(0.1, "FULL", ["a", "b"], 3.0), (0.2, "UDEC", ["c"], 2.0), (9.0, "UDEC", [], None)]
    trials = [
        {
            "params": {"optimizer.lr": lr, "method": method},
            "cells": cells,
            "state": "complete",
            "value": value,
        }
        for lr, method, cells, value in drawn
    ]
    summary = {"metric": "fid.value", "direction": "minimize", "seeds": None, "best": trials[1]}
    summary |= {"importance": {"method": 0.25, "optimizer.lr": 0.75}, "trials": trials}
    (sweep / "search.json").write_text(json.dumps(summary | changes))
    return sweep


def test_the_best_trials_and_the_importance_of_the_keys(tmp_path: Path) -> None:
    trials, importance = search_tables([write(tmp_path)])
    assert trials.columns == ["rank", "optimizer.lr", "method", "fid.value", "cells"]
    assert [[field.text for field in row] for row in trials.rows] == [
        ["1", "0.2", "UDEC", "2", "c"],
        ["2", "0.1", "FULL", "3", "a, b"],
    ]
    assert "Of 3 trials, 2 completed. The search was to minimize fid.value" in trials.note
    assert [[field.text for field in row] for row in importance.rows] == [
        ["optimizer.lr", "75%"],
        ["method", "25%"],
    ]
    trials.write(tmp_path)
    assert "fid.value" in (tmp_path / "search_trials.csv").read_text()


def test_the_largest_is_the_best_where_the_search_maximises(tmp_path: Path) -> None:
    trials, _ = search_tables([write(tmp_path, direction="maximize")])
    assert trials.rows[0][3].text == "3"


@pytest.mark.parametrize("changes", [{"trials": "all"}, {"importance": {"key": "much"}}, {"metric": None}])
def test_a_damaged_file_is_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert search_tables([write(tmp_path, **changes)]) == []
    (tmp_path / "search.json").write_text("{")
    assert search_tables([tmp_path, tmp_path / "absent"]) == []
