"""The record of a running cell: its tables, its time, and its result."""

import csv
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedlight.runs.csv_files import LEDGER_COLUMNS, ROUND_COLUMNS, CsvFile
from fedlight.runs.identity import write_result
from fedlight.runtime.secret import redacted


class Record:
    """The tables and the result of a cell so far.

    Args:
        folder: of the cell.
        result: `result.json` before the first round.
        check: raises if this process has lost the cell's lease; the result is then not written.

    Attributes:
        result: `result.json` so far.
        rounds: entries of the finished rounds: `row` of `rounds.csv`, `client_losses`, `fid`.
        earlier_rounds: number of rounds in the `rounds.csv` of an earlier process.
        on_close: called with the result before it is written.
    """

    def __init__(self, folder: Path, result: dict[str, Any], check: Callable[[], None]) -> None:
        self.folder = folder
        self.result = result
        self._check = check
        self.rounds: list[dict[str, Any]] = []
        self.earlier_rounds = _count_rows(folder / "rounds.csv")
        self.on_close: Callable[[dict[str, Any]], None] = lambda result: None
        self._started = time.perf_counter()
        self.begin()

    def begin(self) -> None:
        """Empties the tables."""
        self.rounds = []
        self._rounds_csv = CsvFile(self.folder / "rounds.csv", ROUND_COLUMNS)
        self._ledger_csv = CsvFile(self.folder / "ledger.csv", LEDGER_COLUMNS)

    def note(
        self, noted: dict[str, Any], exchange: Iterable[dict[str, Any]], total: dict[str, int | float]
    ) -> None:
        """Adds a finished round to the tables.

        Args:
            noted: entry of `rounds`.
            exchange: the round's rows of `ledger.csv`.
            total: the `exchange` entry of `result.json` up to this round.
        """
        row, fid = noted["row"], noted["fid"]
        self.rounds.append(noted)
        self.result["exchange"] = total
        if row["train_loss"] is not None:
            self.result["train_loss"] = row["train_loss"]
        self.result["fid"] = fid or self.result["fid"]
        self._rounds_csv.append([row])
        self._ledger_csv.append(exchange)

    def amend(self, fid: dict[str, Any] | None, columns: dict[str, float | None]) -> None:
        """Adds the scores of the last finished round, which came after its other numbers.

        Args:
            fid: the `fid` entry of `result.json`.
            columns: of the round's row of `rounds.csv`.
        """
        last = self.rounds[-1]
        last["fid"] = fid
        last["row"] |= columns
        self.result["fid"] = fid or self.result["fid"]
        self._rounds_csv.rewrite(entry["row"] for entry in self.rounds)

    def spend(self, **seconds: float) -> None:
        """Adds seconds to the entries of `result["seconds"]`."""
        for name, value in seconds.items():
            self.result["seconds"][name] += value

    @property
    def running(self) -> float:
        """Seconds that are not yet part of the total."""
        return time.perf_counter() - self._started

    def tick(self) -> None:
        """Adds the seconds since the last call to the total."""
        now = time.perf_counter()
        self.spend(total=now - self._started)
        self._started = now

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Writes the result at the end of the block: completed, failed or interrupted."""
        try:
            yield
            self.result["status"] = "completed"
        except BaseException as error:
            self.result["status"] = "failed" if isinstance(error, Exception) else "interrupted"
            self.result["error"] = redacted(str(error)) or type(error).__name__
            with suppress(OSError):  # the disk or the lease may be lost
                self._close()
            raise
        self._close()

    def _close(self) -> None:
        self._check()
        self.tick()
        seconds = self.result["seconds"]
        self.result["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
        self.on_close(self.result)
        write_result(self.folder, self.result)


def _count_rows(path: Path) -> int:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return sum(1 for _ in csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return 0
