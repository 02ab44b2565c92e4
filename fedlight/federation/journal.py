"""Updates that are done and perhaps not yet received: small ones share a file, and a restart does none twice.

A process appends its updates of a round to one file, `rNNNN-PROCESS.updates`: a line of JSON (client, hash
and length of the update, hash of the client's new memory), then the bytes of the update. A record that a kill
cut short is noticed by its hash, and the update is done again. A process locks its file while it appends, so
that others tell a record that is being written from one that was cut short.
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
from fedlight.runtime.errors import Damaged
from fedlight.runtime.files import TEMPORARY, naming, no_follow
from fedlight.runtime.stopwatch import Stopwatch

FILE = re.compile(r"r(\d+)-[0-9a-f]{32}\.updates")
FLUSH = 1.0  # seconds between two flushes to the disk; a power cut costs at most the updates since the last


@dataclass(frozen=True)
class Receipt:
    """Where a finished update is.

    Attributes:
        path, offset, length: of its bytes.
        hash: of its bytes.
        memory: hash of what the client kept, or None where it keeps nothing.
    """

    path: Path
    offset: int
    length: int
    hash: str
    memory: str | None

    def read(self) -> bytes:
        """The bytes of the update.

        Raises:
            Damaged: they are not what was written.
        """
        with naming(self.path), self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.length)
        if fingerprint(content) != self.hash:
            raise Damaged(f"{self.path} is damaged")
        return content


class Journal:
    """The finished updates of the round under way, on this machine.

    Args:
        folder: shared by all processes that train clients on this machine.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._round: int | None = None
        self._found: dict[int, Receipt] = {}
        self._own = ""
        self._flushed = 0.0
        self.watch = Stopwatch()

    def open_round(self, round_: int) -> None:
        """Looks for updates of a round that were done before, and removes those of other rounds."""
        if round_ == self._round:
            return
        with self.watch:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._round, self._found, self._own = round_, {}, f"r{round_:04d}-{uuid4().hex}.updates"
            for path in self._files():
                if path.name.startswith(f"r{round_:04d}-"):
                    with suppress(FileNotFoundError):  # another process has just removed it
                        self._found |= _records(path)
                else:
                    path.unlink(missing_ok=True)

    def find(self, client: int) -> Receipt | None:
        """The finished update of a client in this round, if there is one."""
        return self._found.get(client)

    def add(self, client: int, update: bytes, memory: str | None) -> Receipt:
        """Stores an update, whole, before it is acknowledged."""
        with self.watch:
            hash_ = fingerprint(update)
            head = {"client": client, "hash": hash_, "length": len(update), "memory": memory}
            path = self._folder / self._own
            with naming(path), _open_locked(path) as file:
                file.write(json.dumps(head).encode() + b"\n")
                offset = file.tell()
                file.write(update)
                file.flush()
                if time.monotonic() - self._flushed > FLUSH:
                    os.fsync(file.fileno())
                    self._flushed = time.monotonic()
        receipt = self._found[client] = Receipt(path, offset, len(update), hash_, memory)
        return receipt

    def clear(self) -> None:
        """Removes all updates: the server has them, and has stored what they came to."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        found = self._folder.iterdir() if self._folder.is_dir() else ()  # no message, no folder
        return [path for path in found if FILE.fullmatch(path.name) and path.is_file()]


def _open_locked(path: Path) -> BinaryIO:
    """Opens a file of this process to append to it, and locks it until it is closed.

    A new file is locked before it has its name.
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
    """Locks a file; returns False where another process has it locked, and `kind` says not to wait."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: records may be taken for cut short, and are done again
        return True
    return True


def _records(path: Path) -> dict[int, Receipt]:
    """The whole updates in a file, by client; what follows a damaged one is not read.

    A record at the end that another process is writing is none yet, and no damage.
    """
    found: dict[int, Receipt] = {}
    with naming(path), path.open("rb") as file:
        if _read_records(file, path, found):
            return found
        if not _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB):  # its writer is at it
            return found
        if not _read_records(file, path, found):
            lost = f"fedlight: checkpoint: {path} is damaged or cut short; its clients train once more"
            print(lost, file=sys.stderr)
    return found


def _read_records(file: BinaryIO, path: Path, found: dict[int, Receipt]) -> bool:
    """Adds the records of a file to `found`; returns whether they are whole, and one at least."""
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    try:
        while file.tell() < size:
            head = json.loads(file.readline())
            receipt = Receipt(path, file.tell(), head["length"], head["hash"], head["memory"])
            receipt.read()
            found[head["client"]] = receipt
            file.seek(head["length"], os.SEEK_CUR)
    except (ValueError, KeyError, TypeError, Damaged):
        return False
    return bool(found)
