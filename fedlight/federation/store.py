"""The tensors of a federation on disk, so that memory does not grow with the number of clients."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlight.runtime.files import atomic

State = dict[str, Tensor]
GLOBAL = "global.safetensors"


@dataclass(frozen=True)
class Report:
    """All that leaves a client in a round.

    Attributes:
        client: 0..K-1.
        images: n_k, the number of images that it trained on in a local epoch.
        loss: mean training loss an image over its last local epoch.
        tensors: the declared uplink slices, by state_dict name.
    """

    client: int
    images: int
    loss: float
    tensors: State


class Store:
    """Two folders, `reports/`, what reached the federator this round, and `clients/`, what each keeps, and a
    file for the global slices.

    A client has a file in `clients/` from its first contact on, empty where it keeps nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reports = folder / "reports"
        self._clients = folder / "clients"

    def clear(self) -> None:
        """Forgets everything."""
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._reports.mkdir(parents=True)
        self._clients.mkdir()

    def put_global(self, state: State) -> None:
        """Stores the global slices."""
        _save(state, self._folder / GLOBAL)

    def get_global(self) -> State:
        """The global slices that were stored last."""
        return load_file(self._folder / GLOBAL)

    def put_report(self, report: Report) -> None:
        """Hands a report to the federator."""
        metadata = {"images": str(report.images), "loss": repr(report.loss)}
        _save(report.tensors, self._reports / _name(report.client), metadata)

    def take_reports(self) -> Iterator[Report]:
        """Yields the reports of the round one at a time, in client order, and discards them."""
        for path in sorted(self._reports.glob("client_*.safetensors")):
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            client, images, loss = int(path.stem[-6:]), int(metadata["images"]), float(metadata["loss"])
            yield Report(client, images, loss, load_file(path))
            path.unlink()

    def keep(self, client: int, state: State) -> None:
        """Stores what a client carries over to its next round."""
        _save(state, self._clients / _name(client))

    def has_met(self, client: int) -> bool:
        """Whether the client has had its first contact."""
        return (self._clients / _name(client)).exists()

    def kept(self, client: int) -> State | None:
        """What a client carried over, or None before its first contact."""
        return load_file(self._clients / _name(client)) if self.has_met(client) else None


def _name(client: int) -> str:
    return f"client_{client:06d}.safetensors"


def _save(state: State, path: Path, metadata: dict[str, str] | None = None) -> None:
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata)
