"""The record of a cell as it runs: its tables, its logger, its clock, and the result that closes it."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedlight.loggers.metrics import CellLog
from fedlight.runs.csv_files import LEDGER_COLUMNS, ROUND_COLUMNS, CsvFile
from fedlight.runs.identity import write_result


class Record:
    """What is known of a cell so far.

    Args:
        folder: of the cell.
        result: `result.json` before the first round.

    Attributes:
        result: as it stands.
        rounds: what was noted of each round: `row` of `rounds.csv`, `client_losses`, `fid`.
        log: where metrics go.
    """

    def __init__(self, folder: Path, result: dict[str, Any]) -> None:
        self.folder = folder
        self.result = result
        self.rounds: list[dict[str, Any]] = []
        self.log: CellLog | None = None
        self._rounds_csv = CsvFile(folder / "rounds.csv", ROUND_COLUMNS)
        self._ledger_csv = CsvFile(folder / "ledger.csv", LEDGER_COLUMNS)
        self._started = time.perf_counter()

    def note(
        self, noted: dict[str, Any], exchange: Iterable[dict[str, Any]], total: dict[str, int | float]
    ) -> None:
        """Takes down a finished round.

        Args:
            noted: an entry of `rounds`.
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
        if self.log:
            self.log.round(row, noted["client_losses"], fid or {})

    def spend(self, **seconds: float) -> None:
        """Adds seconds to `result["seconds"]`, under the names that it has."""
        for name, value in seconds.items():
            self.result["seconds"][name] += value

    def tick(self) -> None:
        """Brings the total of seconds up to now."""
        now = time.perf_counter()
        self.spend(total=now - self._started)
        self._started = now

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Writes the result, whatever happens inside: completed, failed or interrupted."""
        try:
            yield
            self.result["status"] = "completed"
        except BaseException as error:
            self.result["status"] = "failed" if isinstance(error, Exception) else "interrupted"
            self.result["error"] = str(error) or type(error).__name__
            with suppress(OSError):  # the disk may be what failed
                self._close()
            raise
        self._close()

    def _close(self) -> None:
        self.tick()
        seconds = self.result["seconds"]
        self.result["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
        if self.log:
            self.log.finish(self.result)
        write_result(self.folder, self.result)
