"""The lease of a cell's folder: on all machines that see the folder, one process at a time works on the cell.

The lease is two files. `.lock` is locked by the kernel (flock) while the holder lives; on some network file
systems such a lock reaches no other machine, or does not exist. So `.holder.json` is the holder's record, and
its modification time the last heartbeat. A process that lives may fail to send them, and lose the lease:
the holder calls `Lease.check` before it stores anything, and stops if the lease is lost.

filelock's leases do not fit: they know no SLURM jobs, and a successor has to wait for the whole timeout.
"""

import errno
import fcntl
import json
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter

from fedlight.runtime.errors import BadInput, LeaseTaken
from fedlight.runtime.files import TEMPORARY
from fedlight.runtime.process_record import HEARTBEAT_TIMEOUT, ProcessRecord, describe_this_process, is_alive

LOCK = ".lock"
HOLDER = ".holder.json"
HEARTBEAT = 15.0  # seconds between two heartbeats
LOCK_TIMEOUT = 90.0  # seconds that a network file system may take to release the lock of a process that ended
NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # the file system has no locks
RECORD = TypeAdapter(ProcessRecord)


class Lease:
    """The right of this process to work in a folder, until another process takes it over."""

    def __init__(self, folder: Path, record: bytes) -> None:
        self._folder = folder
        self._record = record
        self._checked = time.monotonic()

    def check(self, every: float = 0.0) -> None:
        """Reads the holder's record, unless it was read less than `every` seconds ago.

        Raises:
            LeaseTaken: another process has taken the lease over.
        """
        if time.monotonic() - self._checked < every:
            return
        self._checked = time.monotonic()
        if not self.is_valid():
            holder = read_holder(self._folder)
            successor = holder[0] if holder else "an unknown process"
            raise LeaseTaken(
                f"{self._folder.name}: taken over by {successor}; this process stops and stores nothing more"
            )

    def is_valid(self) -> bool:
        """Whether the record in the folder is still that of this process."""
        content = _read(self._folder / HOLDER)
        return content is not None and content[0] == self._record

    def remove_files(self) -> None:
        """Removes the files of the lease, unless they are a successor's."""
        if self.is_valid():
            with suppress(OSError):
                (self._folder / HOLDER).unlink()
                (self._folder / LOCK).unlink()


@contextmanager
def acquire_lease(folder: Path) -> Iterator[Lease]:
    """Makes this process the only one that works in a folder, which is made if it is missing.

    A folder that is empty afterwards is removed, together with the folders made above it.

    Args:
        folder: of the cell.

    Raises:
        LeaseTaken: another process works there.
        BadInput: the folder cannot be written.
    """
    created = [folder, *(path for path in folder.parents if not path.exists())]
    record = json.dumps(asdict(replace(describe_this_process(), token=secrets.token_hex(16)))).encode()
    with ExitStack() as cleanup:  # in reverse order
        cleanup.callback(_remove_empty, created)
        try:
            lock, holder = _acquire(folder, record)
        except LeaseTaken:
            raise
        except OSError as error:
            raise BadInput(f"output: cannot write to {folder}: {error.strerror}") from error
        cleanup.callback(os.close, lock)
        cleanup.callback(os.close, holder)
        lease = Lease(folder, record)
        cleanup.callback(lease.remove_files)
        cleanup.enter_context(_heartbeat(holder))
        yield lease


def read_holder(folder: Path) -> tuple[ProcessRecord, float] | None:
    """The record of a lease's holder, whether it lives or not, and the time of its last heartbeat."""
    with suppress(OSError):
        content = _read(folder / HOLDER)
        if content is not None and (record := _parse(content[0])) is not None:
            return record, content[1]
    return None


def read_file_clock(folder: Path) -> float:
    """The time by the clock of a folder's file system, or by this machine's if the folder is not writable."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=TEMPORARY) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def _acquire(folder: Path, record: bytes) -> tuple[int, int]:
    """Acquires both files of the lease; returns their descriptors, the lock's first."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        with suppress(FileNotFoundError):  # the previous holder has just removed the folder
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder / LOCK)
            if lock is not None:
                holder = _write_record(folder, record)
                if holder is not None:
                    return lock, holder
                os.close(lock)
        known = read_holder(folder)
        expired = time.monotonic() > deadline
        if known and (expired or is_alive(known[0], read_file_clock(folder) - known[1])):
            raise LeaseTaken(f"{folder.name}: in use by {known[0]}")
        if expired:
            raise LeaseTaken(f"{folder.name}: in use by another process, which has locked {folder / LOCK}")
        time.sleep(0.1)


def _lock(path: Path) -> int | None:
    """Locks a file; returns its descriptor, or None if another process has it locked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
    if os.fstat(descriptor).st_nlink == 0:  # the previous holder removed the file before it was locked
        os.close(descriptor)
        return None
    return descriptor


def _write_record(folder: Path, record: bytes) -> int | None:
    """Writes the holder's record; returns its descriptor, or None if another holder lives or was faster."""
    path, known = folder / HOLDER, _read(folder / HOLDER)
    if known is not None:
        if _is_held(folder, *known):
            return None
        aside = folder / f"{TEMPORARY}{secrets.token_hex(16)}"
        with suppress(FileNotFoundError):
            path.rename(aside)  # succeeds in one process only
            moved = _read(aside)
            if moved is not None and moved[0] != known[0]:  # it is the record of a faster process
                aside.rename(path)
                return None
            aside.unlink()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    os.write(descriptor, record)
    return descriptor


def _is_held(folder: Path, content: bytes, heartbeat: float) -> bool:
    """Whether the holder lives; a record that cannot be parsed, perhaps half-written, counts while new."""
    silence, record = read_file_clock(folder) - heartbeat, _parse(content)
    return silence < HEARTBEAT_TIMEOUT if record is None else is_alive(record, silence)


def _read(path: Path) -> tuple[bytes, float] | None:
    """Content and modification time of a file; None if it is missing."""
    try:
        with path.open("rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> ProcessRecord | None:
    with suppress(ValueError):
        return RECORD.validate_json(content)
    return None


@contextmanager
def _heartbeat(holder: int) -> Iterator[None]:
    """Touches the record by its descriptor, since its path may have become that of a successor's record."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(holder)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
