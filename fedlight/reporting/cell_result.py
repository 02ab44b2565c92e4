"""A completed cell as Python and notebooks show it: settings, scores, exchange, rounds, images."""

from base64 import b64encode
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader

from fedlight.reporting import numbers
from fedlight.reporting.frames import read_scores, rounds_frame
from fedlight.runs.reader import CellFiles, Result
from fedlight.runs.status import read_cell
from fedlight.runtime.errors import Damaged


@dataclass(frozen=True)
class CellResult:
    """A completed cell, read from the files in its folder; in a notebook it shows itself.

    Attributes:
        folder: of the cell, `OUTPUT/NAME/CELL`; `fedlight.open_cell` opens its models.
    """

    folder: Path

    @property
    def cell(self) -> str:
        """The id of the cell, the name of its folder."""
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        """The configuration by dotted keys, such as `optimizer.lr`."""
        return self._files.config

    @property
    def method(self) -> str:
        """The name of the method, such as UDEC."""
        return str(self.config["method.name"])

    @property
    def scores(self) -> dict[str, float]:
        """Image quality after the last round, with the column names of `fedlight.load`: `fid`, `kid`, ...

        Lower `fid` and `kid` are better; shares, such as `precision`, are 0..1. Empty where no images were
        scored (`evaluation.samples=0`).
        """
        return read_scores(self._result)

    @property
    def exchange(self) -> dict[str, float | int | None]:
        """What was exchanged, both ways, in all rounds, with all clients.

        `params_total` and `bytes_total`; `reduction` is the share of the parameters saved against FULL, 0..1.
        """
        return self._result.exchange.model_dump()

    @property
    def train_loss(self) -> float | None:
        """The mean loss of the clients in the last round; None for a cell without rounds."""
        return self._result.train_loss

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds in `total` and by kind: `training`, `merging`, `evaluation`, `checkpoint`."""
        return self._result.seconds

    @property
    def rounds(self) -> pd.DataFrame:
        """A row for each round, as `fedlight.load` returns it with `rounds=True`."""
        return rounds_frame([read_cell(self.folder, None, {})])

    @property
    def images(self) -> Path | None:
        """The PNG of the images that were generated last; None for `evaluation.grid=0`."""
        return max((self.folder / "samples").glob("round_*.png"), default=None)

    @cached_property
    def _files(self) -> CellFiles:
        return CellFiles(self.folder)

    @property
    def _result(self) -> Result:
        if (result := self._files.result) is None:
            raise Damaged(f"{self.folder / 'result.json'} is missing or damaged; run the cell again")
        return result

    def _facts(self) -> dict[str, str]:
        """What the cell is and what came out, as printed."""
        config, exchange, scores = self.config, self._result.exchange, self.scores
        fid, loss = scores.get("fid"), self.train_loss
        return {
            "method": self.method,
            "data": f"{config['data.name']}, {config['partition.name']}",
            "clients": numbers.count(config["clients"]),
            "rounds": f"{config['rounds']} of {config['epochs']} local epochs",
            "FID": numbers.NONE if fid is None else numbers.score(fid, scores.get("fid_std")),
            "loss": numbers.NONE if loss is None else numbers.loss(loss),
            "exchanged": f"{numbers.count(exchange.params_total)} parameters, "
            f"{numbers.data_volume(exchange.bytes_total)}",
            "time": numbers.seconds(self.seconds["total"]),
        }

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {text}" for name, text in self._facts().items())
        return f"<CellResult {self.folder}: {facts}>"

    def _repr_html_(self) -> str:
        """A table with the facts of the cell, and its images."""
        environment = Environment(loader=PackageLoader("fedlight.reporting"), autoescape=True)
        image = b64encode(self.images.read_bytes()).decode() if self.images else None
        template = environment.get_template("cell_result.html")
        return template.render(folder=self.folder, facts=self._facts(), image=image)
