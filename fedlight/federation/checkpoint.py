"""What a restart needs: the server's checkpoint, and each client's memory.

Neither side reads the files of the other. Every file has the form of a message and is written whole; its name
ends in the hash of its bytes, so that damage is noticed. A run sets a damaged file aside as `NAME.damaged`;
whoever only reads (`mends=False`) leaves it as it is. Files that are not ours are left alone.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedlight.federation.messages import State, fingerprint, pack, unpack
from fedlight.runtime.errors import Damaged
from fedlight.runtime.files import atomic, naming
from fedlight.runtime.stopwatch import Stopwatch

VERSION = re.compile(r"(?:server-)?r(\d+)-([0-9a-f]{16})\.safetensors")


class ServerCheckpoint:
    """The server's side after each round: `server-rNNNN-HASH.safetensors`, of the last two rounds.

    Args:
        folder: of the checkpoint.
        cell: whose federation it is; files of another are not taken.
        repair: whether damaged files are told of and set aside.
    """

    def __init__(self, folder: Path, cell: str, repair: bool = True) -> None:
        self._folder = folder
        self._cell = cell
        self._repair = repair
        self.watch = Stopwatch()

    def read(self) -> Iterator[tuple[int, dict[str, Any], dict[str, State]]]:
        """Round, header and tensors of each whole checkpoint, the last first."""
        for round_, path in sorted(_versions(self._folder, "server-").items(), reverse=True):
            try:
                header, groups = _read(path, self._cell, self.watch, self._repair)
            except Damaged as error:
                if self._repair:
                    print(f"fedlight: checkpoint: {error}; going back a round", file=sys.stderr)
                continue
            yield round_, header, groups

    def write(self, round_: int, header: dict[str, Any], groups: dict[str, State]) -> None:
        """Stores the server after a round, and removes what is older than the round before."""
        _write(self._folder, f"server-r{round_:04d}", {**header, "cell": self._cell}, groups, self.watch)
        _remove(self._folder, "server-", lambda version: version < round_ - 1)


class ClientMemory:
    """What clients keep between rounds, each in a folder of its own: `NNNNNN/rNNNN-HASH.safetensors`.

    A memory of round r is what the client kept after its update in that round. The server may go back by one
    round, so a client keeps what it needs to go on from the two rounds before, and nothing older.

    Args:
        folder: holds a folder for each client that keeps anything.
        cell: whose federation it is.
        repair: whether damaged files are set aside.
    """

    def __init__(self, folder: Path, cell: str, repair: bool = True) -> None:
        self._folder = folder
        self._cell = cell
        self._repair = repair
        self.watch = Stopwatch()

    def read(self, client: int, round_: int, hash_: str = "") -> dict[str, State]:
        """The memory of a client as it was after a round in which it took part.

        Raises:
            Damaged: it is missing, is not the one with the given hash, or does not hold what was written.
        """
        path = _versions(self._place(client)).get(round_)
        if path is None or not path.stem.endswith(hash_):
            raise Damaged(f"{self._place(client) / f'r{round_:04d}-{hash_}'} is missing")
        return _read(path, self._cell, self.watch, self._repair)[1]

    def write(self, client: int, round_: int, memory: dict[str, State], previous: int) -> str:
        """Stores what a client keeps after a round, and removes what is too old; returns the hash.

        What it kept in the round `previous`, the last one that the server knows of, stays.
        """
        place = self._place(client)
        place.mkdir(parents=True, exist_ok=True)
        hash_ = _write(place, f"r{round_:04d}", {"cell": self._cell}, memory, self.watch)
        older = [version for version in _versions(place) if version <= min(previous, round_ - 2)]
        _remove(place, "", lambda version: version < max(older, default=0) or version > round_)
        return hash_

    def _place(self, client: int) -> Path:
        return self._folder / f"{client:06d}"


def last_versions(folder: Path) -> list[Path]:
    """The last file of the server, and of each client, in a checkpoint's folder that can be seen."""
    parents = [Path(parent) for parent, _, _ in os.walk(folder)]
    return [max(found.items())[1] for parent in sorted(parents) if (found := _versions(parent))]


def _versions(folder: Path, prefix: str = "") -> dict[int, Path]:
    """Our files in a folder, by round."""
    return dict(_ours(folder, prefix))


def _ours(folder: Path, prefix: str) -> Iterator[tuple[int, Path]]:
    """Round and path of each of our files in a folder, which may be missing."""
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            match = VERSION.fullmatch(path.name)
            if match and path.name.startswith(prefix) and path.is_file():
                yield int(match[1]), path


def _read(path: Path, cell: str, watch: Stopwatch, repair: bool) -> tuple[dict[str, Any], dict[str, State]]:
    with watch:
        try:
            with naming(path):
                content = path.read_bytes()
        except FileNotFoundError as error:
            raise Damaged(f"{path} is missing") from error
        try:
            if not path.stem.endswith(fingerprint(content)):
                raise Damaged(f"{path} is damaged")
            header, groups = unpack(content)
            if header["cell"] != cell:
                raise Damaged(f"{path} belongs to another cell")
        except Damaged:
            if repair:
                with suppress(FileNotFoundError):
                    path.rename(path.with_name(f"{path.name}.damaged"))
            raise
    return header, groups


def _write(
    folder: Path, stem: str, header: dict[str, Any], groups: dict[str, State], watch: Stopwatch
) -> str:
    with watch:
        content = pack(header, groups)
        hash_ = fingerprint(content)
        path = folder / f"{stem}-{hash_}.safetensors"
        with atomic(path) as temporary:
            temporary.write_bytes(content)
        for _, other in list(_ours(folder, f"{stem}-")):
            if other != path:
                other.unlink(missing_ok=True)
    return hash_


def _remove(folder: Path, prefix: str, obsolete: Any) -> None:
    for version, path in list(_ours(folder, prefix)):
        if obsolete(version):
            path.unlink(missing_ok=True)
