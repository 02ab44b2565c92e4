"""The table at the end of a sweep: method x clients, what was exchanged and at what loss."""

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from fedlight.runs.identity import read_result
from fedlight.runs.palette import rank
from fedlight.runs.plan import PLAN

SETTINGS = ("data", "partition", "model", "rounds", "epochs", "fraction", "seed")
WIDTH = 120  # in a file or a pipe, in characters


class SweepWatch(Callback):
    """Hydra callback: watches over the folder of the multirun under way in this process."""

    folder: ClassVar[Path | None] = None
    created: ClassVar[list[Path]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepWatch.folder = folder = Path(config.output) / config.name
        SweepWatch.created = [path for path in (folder, folder.parent) if not path.exists()]

    @classmethod
    def close(cls) -> None:
        """Prints the sweep's table; folders that it created and left without a cell are removed again."""
        folder, cls.folder = cls.folder, None
        if folder is None:
            return
        if any(path.is_dir() and path.name != PLAN for path in folder.glob("*")):  # a cell, or logs of jobs
            print_summary(folder)
            return
        shutil.rmtree(folder / PLAN, ignore_errors=True)
        (folder / "multirun.yaml").unlink(missing_ok=True)
        for path in cls.created:
            with suppress(OSError):
                path.rmdir()


def print_summary(sweep: Path) -> None:
    """Prints a row for each cell in the sweep's folder; what all cells share stands in the title."""
    results = [result for folder in sorted(sweep.glob("*/")) if (result := read_result(folder))]
    if not results:
        return
    varying = [key for key in SETTINGS if len({result[key] for result in results}) > 1]
    shared = ", ".join(f"{key} {results[0][key]}" for key in SETTINGS if key not in varying)
    table = Table(title=f"{sweep}: {len(results)} cells, {shared}", title_justify="left")
    for column in (*varying, "method"):
        table.add_column(column)
    numbers = ("clients", "params exchanged", "against FULL", "training loss")
    for column in (*numbers, "extractor", "FID", "± clients", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("status")
    for result in sorted(results, key=_position):
        exchange, loss, fid = result["exchange"], result["train_loss"], result["fid"]
        table.add_row(
            *(str(result[key]) for key in varying),
            result["method"],
            str(result["clients"]),
            f"{exchange['params_total']:,}",
            f"{-exchange['reduction']:+.1%}" if exchange["reduction"] else "",
            f"{loss:.4f}" if loss is not None else "",
            fid["extractor"] if fid else "",
            f"{fid['value']:.2f}" if fid else "",
            f"{fid['std']:.2f}" if fid and fid["std"] is not None else "",
            f"{result['seconds']['total']:.0f}",
            result["status"],
        )
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    console.print(f"tables, figures and samples: python -m fedlight.report {sweep}", soft_wrap=True)


def _position(result: dict[str, Any]) -> tuple[Any, ...]:
    return result["data"], result["partition"], rank(result["method"]), result["clients"], result["seed"]
