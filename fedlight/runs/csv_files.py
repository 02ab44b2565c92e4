"""The CSV files of a cell: `rounds.csv`, `ledger.csv` and `partition.csv`."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedlight.runtime.files import atomic, no_follow

EXCHANGE_COLUMNS = (
    "params_down",
    "params_up",
    "params_cumulative",
    "bytes_cumulative",
    "participants",
    "reports",
)
"""Columns of `rounds.csv` with the exchange of a round, in whole numbers."""

ROUND_COLUMNS = (
    "round",
    "train_loss",
    *EXCHANGE_COLUMNS,
    "fid",
    "seconds",
    "epsilon",
    "density",
    "coverage_knn",
    "downstream_accuracy",
)
LEDGER_COLUMNS = ("round", "client", "direction", "slice", "params", "bytes")


class CsvFile:
    """A CSV file to which rows are appended; None is written as an empty field."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = columns
        with open(path, "w", newline="", encoding="utf-8", opener=no_follow) as file:
            csv.writer(file).writerow(columns)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        with open(self.path, "a", newline="", encoding="utf-8", opener=no_follow) as file:
            csv.DictWriter(file, self.columns).writerows(rows)

    def rewrite(self, rows: Iterable[dict[str, Any]]) -> None:
        """Replaces all rows; a reader sees the file before or after."""
        with (
            atomic(self.path, durable=False) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def write_partition(path: Path, counts: NDArray[Any], classes: Sequence[str]) -> None:
    """Writes the number of images of each client and label; `counts` has shape (clients, classes)."""
    file = CsvFile(path, ("client", "label", "count"))
    file.append(
        {"client": client, "label": label, "count": count}
        for client, row in enumerate(counts.tolist())
        for label, count in zip(classes, row, strict=True)
    )
