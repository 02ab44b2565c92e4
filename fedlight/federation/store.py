"""A federation on disk: all that a restart needs, in files that tell whether they are whole."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedlight.runtime.errors import Damaged
from fedlight.runtime.files import atomic

State = dict[str, Tensor]


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


@dataclass(frozen=True)
class Saved:
    """The federator's side after a round.

    Attributes:
        round: 1..R.
        state: the global slices.
        history: what the cell noted so far, as JSON knows it.
    """

    round: int
    state: State
    history: dict[str, Any]


@dataclass(frozen=True)
class Files:
    """Where the tensors of one client are, as processes that share the checkpoint tell each other.

    Attributes:
        federator: of the last whole round, or None before the first.
        kept: what the client carries over, or None before its first contact, or where it keeps nothing.
        report: of the round under way, or None where its update is not done.
        seconds: spent on writing them.
    """

    federator: Path | None
    kept: Path | None
    report: Path | None
    seconds: float = 0.0


class Store:
    """The tensors of a federation, kept in files, so that memory does not grow with the number of clients.

    `global-rNNNN-HASH` is the federator's side after a round, and lists the files of the private states
    that belong to it; `clients/NNNNNN-rNNNN-HASH` is what a client kept after its update in that round;
    `reports/NNNNNN-rNNNN-HASH` is what it reported, and is written last, so that an update is either done
    or not. All are safetensors, written whole, and HASH is that of their bytes. The state of the round
    before is kept until the next round is whole, and nothing older.

    Args:
        folder: of the checkpoint.
        cell: whose federation it is; files of another are not taken.
    """

    def __init__(self, folder: Path, cell: str) -> None:
        self._folder = folder
        self._cell = cell
        self._reports: dict[int, Path] = {}
        self._clients: dict[int, Path] = {}
        self._federator: Path | None = None
        self._whole: set[Path] = set()
        self._seconds = 0.0

    def resume(self, keeping: bool) -> Saved | None:
        """Takes up where the process before left off, or returns None where there is no whole round.

        Finished updates of the round after are kept; what is damaged is named on stderr and removed, and
        all that depends on it is done again.

        Args:
            keeping: whether clients carry anything over from round to round.
        """
        for folder in ("clients", "reports"):
            (self._folder / folder).mkdir(parents=True, exist_ok=True)
        rounds = self._whole_rounds()
        saved, self._whole = next(rounds, (None, set()))
        _, before = next(rounds, (None, set()))
        self._clients = {_client_of(path): path for path in self._whole if path.parent.name == "clients"}
        self._federator = next((path for path in self._whole if path.parent == self._folder), None)
        under_way = saved.round + 1 if saved else 1
        for lost in {_round_of(path) for path in self._folder.glob("*/*-r*")} - {*range(under_way + 1)}:
            print(f"fedlight: checkpoint: global-r{lost - 1:04d} is missing; going back", file=sys.stderr)
        self._reports = self._finished_updates(under_way, keeping)
        self._remove_all_but(before)
        return saved

    def take_seconds(self) -> float:
        """Seconds spent on files since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def save_update(self, round_: int, report: Report, private: State) -> None:
        """Stores what a client keeps, then its report, with which the update is done."""
        self.keep(round_, report.client, private)
        metadata = {"images": str(report.images), "loss": repr(report.loss)}
        self._reports[report.client] = self._write(
            f"reports/{report.client:06d}-r{round_:04d}", report.tensors, metadata
        )

    def keep(self, round_: int, client: int, private: State) -> None:
        """Stores what a client carries over to its next round."""
        if private:
            self._clients[client] = self._write(f"clients/{client:06d}-r{round_:04d}", private, {})

    def has_report(self, client: int) -> bool:
        """Whether the client's update of the round under way is done."""
        return client in self._reports

    def kept(self, client: int) -> State:
        """What a client carried over; nothing before its first contact.

        Raises:
            Damaged: its file does not hold what was written.
        """
        path = self._clients.get(client)
        return self._read(path)[0] if path else {}

    def reports(self) -> Iterator[Report]:
        """Yields the reports of the round one at a time, in client order."""
        for client, path in sorted(self._reports.items()):
            tensors, metadata = self._read(path)
            yield Report(client, int(metadata["images"]), float(metadata["loss"]), tensors)

    def files(self, client: int) -> Files:
        """Where the client's tensors are now."""
        return Files(self._federator, self._clients.get(client), self._reports.get(client))

    def adopt(self, client: int, files: Files) -> None:
        """Takes over what another process of the same checkpoint has written of a client, or is to read."""
        self._federator = files.federator
        for known, path in ((self._clients, files.kept), (self._reports, files.report)):
            known.pop(client, None)
            if path is not None:
                known[client] = path
        self._seconds += files.seconds

    def global_state(self) -> State:
        """The global slices of the last whole round.

        Raises:
            Damaged: their file does not hold what was written.
        """
        assert self._federator is not None
        return self._read(self._federator)[0]

    def commit(self, saved: Saved) -> None:
        """Stores the federator's side after a round, and removes what no restart needs any more."""
        clients = [path.name for path in self._clients.values()]
        metadata = {"history": json.dumps(saved.history), "clients": json.dumps(clients)}
        path = self._write(f"global-r{saved.round:04d}", saved.state, metadata)
        before, self._whole, self._reports = self._whole, {path, *self._clients.values()}, {}
        self._federator = path
        self._remove_all_but(before)

    def _whole_rounds(self) -> Iterator[tuple[Saved, set[Path]]]:
        """The rounds that are on disk with all their files, the last one first."""
        for path in sorted(self._folder.glob("global-r*"), key=_round_of, reverse=True):
            try:
                state, metadata = self._read(path)
                clients = {self._folder / "clients" / name for name in json.loads(metadata["clients"])}
                for kept in clients:
                    _check(kept)
            except Damaged as error:
                print(f"fedlight: checkpoint: {error}; going back a round", file=sys.stderr)
                continue
            yield Saved(_round_of(path), state, json.loads(metadata["history"])), {path, *clients}

    def _finished_updates(self, round_: int, keeping: bool) -> dict[int, Path]:
        """The reports of the round under way whose clients' private states are there, too."""
        reports = {}
        for path in self._folder.glob(f"reports/*-r{round_:04d}-*"):
            try:
                self._read(path)
                if keeping:
                    self._clients[_client_of(path)] = self._only(path.name.rpartition("-")[0])
            except Damaged as error:
                print(f"fedlight: checkpoint: {error}; its client trains once more", file=sys.stderr)
                continue
            reports[_client_of(path)] = path
        return reports

    def _only(self, stem: str) -> Path:
        """The one whole file in `clients/` of that client and round."""
        path = next(self._folder.glob(f"clients/{stem}-*"), self._folder / "clients" / stem)
        _check(path)
        return path

    def _remove_all_but(self, before: set[Path]) -> None:
        """Removes what belongs neither to the round under way nor to the last two whole ones."""
        needed = {*self._reports.values(), *self._clients.values(), *self._whole, *before}
        for path in self._folder.rglob("*"):
            if path.is_file() and path not in needed:
                path.unlink()

    def _write(self, stem: str, state: State, metadata: dict[str, str]) -> Path:
        begun = time.perf_counter()
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        content = save(tensors, {**metadata, "cell": self._cell})
        path = self._folder / f"{stem}-{_hash(content)}.safetensors"
        with atomic(path) as temporary:
            temporary.write_bytes(content)
        self._seconds += time.perf_counter() - begun
        return path

    def _read(self, path: Path) -> tuple[State, dict[str, str]]:
        begun = time.perf_counter()
        _check(path)
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{path} cannot be read ({error})") from error
        if metadata["cell"] != self._cell:
            raise Damaged(f"{path} belongs to another cell")
        self._seconds += time.perf_counter() - begun
        return state, metadata


def _check(path: Path) -> None:
    """Raises Damaged unless the file holds what its name says."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from error
    if not path.stem.endswith(f"-{_hash(content)}"):
        raise Damaged(f"{path} is damaged")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _client_of(path: Path) -> int:
    return int(path.name.split("-")[0])


def _round_of(path: Path) -> int:
    return int(path.name.split("-")[1].removeprefix("r"))
