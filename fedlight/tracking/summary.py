"""The table at the end of a sweep: method x clients, what was exchanged and at what loss."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from fedlight.tracking.cell import read_result


class PrintSummary(Callback):
    """Hydra callback: prints the sweep's table when a multirun ends."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        print_summary(Path(config.output) / config.name)


def print_summary(sweep: Path) -> None:
    """Prints a row for each cell in the sweep's folder, by partition, method and clients."""
    results = [result for folder in sorted(sweep.glob("*/")) if (result := read_result(folder))]
    if not results:
        return
    table = Table(title=f"{sweep} ({len(results)} cells)", title_justify="left")
    for column in ("data", "partition", "method"):
        table.add_column(column)
    for column in ("clients", "seed", "params exchanged", "against FULL", "training loss", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("status")
    order = ("FULL", "USPLIT", "UDEC", "ULATDEC", "LOCAL", "CENTRAL")
    rank = {name: position for position, name in enumerate(order)}
    results.sort(
        key=lambda r: (
            r["data"],
            r["partition"],
            rank.get(r["method"], len(rank)),
            r["method"],
            r["clients"],
            r["seed"],
        )
    )
    for result in results:
        exchange, loss = result["exchange"], result["train_loss"]
        table.add_row(
            result["data"],
            result["partition"],
            result["method"],
            str(result["clients"]),
            str(result["seed"]),
            f"{exchange['params_total']:,}" if exchange else "",
            f"{-exchange['reduction']:+.1%}" if exchange and exchange["reduction"] else "",
            f"{loss:.4f}" if loss is not None else "",
            f"{result['seconds']['total']:.0f}",
            result["status"],
        )
    Console().print(table)
