"""The journal of finished updates: a restarted cell does not train a client of the current round again.

Each process appends its updates of a round to a file of its own, `rNNNN-PROCESS.updates`: a line of JSON
(client, hash and length of the update, hash of the client's new memory), then the bytes of the update. If a
kill cut a record short, its hash does not match, and the update is done again. A process locks its file while
it appends, so that readers can tell a record that is being written from a damaged one.
"""

import fcntl
import json
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from fedlight.federation.messages import fingerprint
from fedlight.federation.store import verify
from fedlight.runtime.errors import Damaged
from fedlight.runtime.files import TEMPORARY, naming, no_follow
from fedlight.runtime.stopwatch import Stopwatch

FILE = re.compile(r"r(\d+)-[0-9a-f]{32}\.updates")
FLUSH = 1.0  # seconds between two flushes to the disk; a power cut loses the updates after the last one


@dataclass(frozen=True)
class Receipt:
    """Where a finished update is stored.

    Attributes:
        path, offset, length: file, first byte and number of bytes.
        hash: of these bytes.
        memory: hash of the client's memory after the update, or None if it keeps none.
    """

    path: Path
    offset: int
    length: int
    hash: str
    memory: str | None

    def read(self) -> bytes:
        """Reads the bytes of the update.

        Raises:
            Damaged: they are not those that were written.
        """
        with naming(self.path), self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.length)
        verify(content, self.hash, self.path)
        return content


class Journal:
    """The finished updates of the current round on one machine.

    Args:
        folder: shared by all processes that train clients on the machine.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._round: int | None = None
        self._receipts: dict[int, Receipt] = {}
        self._path = folder
        self._flushed = 0.0
        self.watch = Stopwatch()

    def open_round(self, round_: int) -> None:
        """Finds the updates of a round that are done already; removes those of other rounds."""
        if round_ == self._round:
            return
        with self.watch:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._round, self._receipts = round_, {}
            self._path = self._folder / f"r{round_:04d}-{uuid4().hex}.updates"
            for path in self._files():
                if path.name.startswith(f"r{round_:04d}-"):
                    with suppress(FileNotFoundError):  # another process has just removed it
                        self._receipts |= _read_receipts(path)
                else:
                    path.unlink(missing_ok=True)

    def find(self, client: int) -> Receipt | None:
        """The finished update of a client in this round; None if there is none."""
        return self._receipts.get(client)

    def add(self, client: int, update: bytes, memory: str | None) -> Receipt:
        """Appends an update; when this returns, a kill of the process does not lose it."""
        with self.watch:
            hash_ = fingerprint(update)
            head = {"client": client, "hash": hash_, "length": len(update), "memory": memory}
            with naming(self._path), _open_locked(self._path) as file:
                file.write(json.dumps(head).encode() + b"\n")
                offset = file.tell()
                file.write(update)
                file.flush()
                if time.monotonic() - self._flushed > FLUSH:
                    os.fsync(file.fileno())
                    self._flushed = time.monotonic()
        receipt = self._receipts[client] = Receipt(self._path, offset, len(update), hash_, memory)
        return receipt

    def clear(self) -> None:
        """Removes all updates, which the server has aggregated and stored."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        paths = self._folder.iterdir() if self._folder.is_dir() else ()
        return [path for path in paths if FILE.fullmatch(path.name) and path.is_file()]


def _open_locked(path: Path) -> BinaryIO:
    """Opens the file of this process to append to it, and locks it until it is closed.

    A new file is locked before it gets its name.
    """
    try:
        handle, name = no_follow(str(path), os.O_WRONLY | os.O_APPEND), path
    except FileNotFoundError:
        name = path.with_name(f"{TEMPORARY}{path.name}")
        handle = no_follow(str(name), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
    file = os.fdopen(handle, "ab")
    _lock(file, fcntl.LOCK_EX)
    if name != path:
        name.rename(path)
    return file


def _lock(file: BinaryIO, kind: int) -> bool:
    """Locks a file; returns False if another process has it locked and `kind` includes LOCK_NB."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks: a record being written may count as damaged
        return True
    return True


def _read_receipts(path: Path) -> dict[int, Receipt]:
    """The receipts of a file by client, up to the first damaged record, which is reported on stderr.

    A record at the end that another process is writing is ignored.
    """
    with naming(path), path.open("rb") as file:
        receipts, is_whole = _read_records(file, path)
        if not is_whole and _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB):  # else its writer is appending
            receipts, is_whole = _read_records(file, path)
            if not is_whole:
                message = f"fedlight: checkpoint: {path} is damaged or cut short; its clients train once more"
                print(message, file=sys.stderr)
    return receipts


def _read_records(file: BinaryIO, path: Path) -> tuple[dict[int, Receipt], bool]:
    """The receipts of a file by client, and whether it holds one at least and none is damaged."""
    receipts: dict[int, Receipt] = {}
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    try:
        while file.tell() < size:
            head = json.loads(file.readline())
            receipt = Receipt(path, file.tell(), head["length"], head["hash"], head["memory"])
            verify(file.read(receipt.length), receipt.hash, path)
            receipts[head["client"]] = receipt
    except (ValueError, KeyError, TypeError, Damaged):
        return receipts, False
    return receipts, bool(receipts)
