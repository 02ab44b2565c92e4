"""Measures that not every cell has: their columns, and the figure over time."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from plausible import write_cell

from fedlight.reporting.comparison import make_comparisons
from fedlight.reporting.page import read_cells
from fedlight.reporting.rounds_figure import fid_seconds
from fedlight.reporting.summaries import by_cell, in_full


def measured(folder: Path) -> None:
    """Adds the measures to a cell that was written without them."""
    path = folder / "result.json"
    result = json.loads(path.read_text())
    accuracy = {"generated": 0.61, "own": 0.2, "all": 0.98, "per_client": None, "own_per_client": None}
    result["fid"] |= {"density": 0.75, "coverage_knn": 0.5, "downstream_accuracy": accuracy}
    result["seconds"] |= {"training": 50.0, "startup": 7.0}
    result["memory"] = {"peak_mb": 1234.5, "gpu_peak_mb": None, "processes": 2}
    result["flops"] = {"training": 10**12, "sampling": 10**11, "total": 11 * 10**11}
    path.write_text(json.dumps(result))


def test_measures_are_columns_where_some_cell_has_them(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    measured(write_cell(sweep, "FULL"))
    write_cell(sweep, "UDEC")
    cells = read_cells([sweep])
    table = by_cell(cells)
    rows: list[dict[str, Any]] = [line for line in table.data if line["method"] == "FULL"]
    keys = ("density", "coverage_knn", "downstream_accuracy", "downstream_accuracy_own")
    assert [rows[0][key] for key in keys] == [0.75, 0.5, 0.61, 0.2]
    costs = ("downstream_accuracy_all", "peak_mb", "flops", "seconds_training", "seconds_startup")
    assert [rows[0][key] for key in costs] == [0.98, 1234.5, 11e11, 50.0, 7.0]
    texts = {field.text for row in table.rows for field in row}
    assert {"1.2 GB", "1.10e+12"} <= texts
    assert "gpu_peak_mb" not in rows[0]
    (comparison,) = make_comparisons(cells)
    heads = in_full(comparison, "").columns
    assert {"density", "coverage (kNN)", "downstream accuracy"} <= {*heads}
    assert "memory" not in heads


def test_without_them_the_tables_have_no_such_columns(tmp_path: Path) -> None:
    write_cell(tmp_path / "sweep", "FULL")
    columns = by_cell(read_cells([tmp_path / "sweep"])).columns
    assert not {"density", "downstream accuracy", "memory", "FLOPs", "time, startup"}.intersection(columns)


def test_fid_over_seconds_adds_up_the_rounds_and_takes_the_mean_over_seeds(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for seed, pace in ((1, 2.0), (2, 4.0)):
        folder = write_cell(sweep, "FULL", seed=seed, rounds=4)
        with (folder / "rounds.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("round", "train_loss", "params_cumulative", "bytes_cumulative", "fid", "seconds"))
            for round_ in range(1, 5):
                fid = 40 / round_ + seed if round_ % 2 == 0 else ""
                table.writerow((round_, 0.4, 10, 40, fid, pace))
    (comparison,) = make_comparisons(read_cells([sweep]))
    data = fid_seconds(comparison, "").data
    assert data["round"].tolist() == [2, 4]
    assert data["seconds_cumulative"].tolist() == pytest.approx([(4 + 8) / 2, (8 + 16) / 2])
    assert data["fid"].tolist() == pytest.approx([20 + 1.5, 10 + 1.5])
