"""What a restart needs: the server's checkpoint, and each client's memory.

Neither side reads the files of the other.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from fedlight.federation.ledger import Direction
from fedlight.federation.messages import State
from fedlight.federation.store import Versions
from fedlight.runtime.errors import Damaged
from fedlight.runtime.stopwatch import Stopwatch
from fedlight.runtime.untrusted import first_error

Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]

SERVER = "server-"  # prefix of the server's files


class ServerHeader(BaseModel):
    """Schema of the header of a server's file: a finished cell may come from an untrusted source."""

    model_config = ConfigDict(extra="forbid")

    cell: str
    met: list[tuple[Count, Count]]
    trained: list[Count] | None = None
    ledger: list[tuple[Count, Count, Direction, str, Count, Count]]
    visits: Count
    history: dict[str, JsonValue]


class ServerCheckpoint:
    """The server's state after each of the last two rounds: `server-rNNNN-HASH.safetensors`.

    Args:
        folder: of the checkpoint.
        cell: id of the federation.
        repair: whether damaged files are reported on stderr and renamed.

    Attributes:
        damages: messages on the damaged files that were read.
    """

    def __init__(self, folder: Path, cell: str, repair: bool = True) -> None:
        self._versions = Versions(folder, cell, SERVER, repair)
        self._repair = repair
        self.damages: list[str] = []
        self.watch = Stopwatch()

    def read(self) -> Iterator[tuple[int, dict[str, Any], dict[str, State]]]:
        """Yields round, header and tensors of each undamaged checkpoint, the latest first."""
        for round_, path in sorted(self._versions.find().items(), reverse=True):
            try:
                with self.watch:
                    header, groups = self._versions.read(path)
                    _check_header(path, header)
            except Damaged as error:
                self.damages.append(str(error))
                if self._repair:
                    print(f"fedlight: checkpoint: {error}; going back a round", file=sys.stderr)
                continue
            yield round_, header, groups

    @property
    def last_round(self) -> int:
        """The last round of which there is a file, damaged or not; 0 without one."""
        return max(self._versions.find(), default=0)

    def write(self, round_: int, header: dict[str, Any], groups: dict[str, State]) -> None:
        """Stores the server's state after a round; removes states older than the round before."""
        with self.watch:
            self._versions.write(round_, header, groups)
        self._versions.remove(lambda version: version < round_ - 1)


class ClientMemory:
    """The state that each client keeps between rounds: `NNNNNN/rNNNN-HASH.safetensors`.

    The version of round r is what the client kept after its update in round r. The server may go back by one
    round, so a client keeps the versions that it needs to go on from either of the last two rounds.

    Args:
        folder: holds a folder for each client that keeps any state.
        cell: id of the federation.
        repair: whether damaged files are renamed.
    """

    def __init__(self, folder: Path, cell: str, repair: bool = True) -> None:
        self._folder = folder
        self._cell = cell
        self._repair = repair
        self.watch = Stopwatch()

    def read(self, client: int, round_: int, hash_: str = "") -> dict[str, State]:
        """The memory of a client after its update in a round.

        Raises:
            Damaged: it is missing, does not have the given hash, or is not what was written.
        """
        versions = self._versions(client)
        path = versions.find().get(round_)
        if path is None or not path.stem.endswith(hash_):
            raise Damaged(f"{self._place(client) / f'r{round_:04d}-{hash_}'} is missing")
        with self.watch:
            return versions.read(path)[1]

    def write(self, client: int, round_: int, memory: dict[str, State], previous: int) -> str:
        """Stores the memory of a client after a round; returns its hash.

        Removes older versions, but that of `previous`, the client's last round that the server knows of.
        """
        self._place(client).mkdir(parents=True, exist_ok=True)
        versions = self._versions(client)
        with self.watch:
            hash_ = versions.write(round_, {}, memory)
        older = [version for version in versions.find() if version <= min(previous, round_ - 2)]
        versions.remove(lambda version: version < max(older, default=0) or version > round_)
        return hash_

    def _place(self, client: int) -> Path:
        return self._folder / f"{client:06d}"

    def _versions(self, client: int) -> Versions:
        return Versions(self._place(client), self._cell, repair=self._repair)


def _check_header(path: Path, header: dict[str, Any]) -> None:
    """Raises Damaged where the header of a server's file is not of the schema."""
    try:
        ServerHeader.model_validate(header)
    except ValidationError as error:
        raise Damaged(f"{path} holds no state of a server ({first_error(error)})") from error


def last_versions(folder: Path) -> list[Path]:
    """The latest file of the server, and of each client whose memory is below a checkpoint's folder."""
    folders = sorted(Path(parent) for parent, _, _ in os.walk(folder))
    states = [Versions(parent, "", prefix) for parent in folders for prefix in (SERVER, "")]
    return [max(versions.items())[1] for state in states if (versions := state.find())]
